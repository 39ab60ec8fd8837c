"""How model families name their layers, and what they omit from config.json."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from typing import Any

Flag = bool | str  # the value, or the key of config.json that has it


@dataclass(frozen=True)
class Family:
    """The architecture of a family of models.

    Attributes:
        attention: q, k, v, output; or q, k and v in one, and the output.
        mlp: gate, up, down; or gate and up in one, and down; or in and out without a gate.
        qk_norm: norms of queries and keys, over one head or over all of them.
        norms: the number of norms per layer that are as wide as the model.
        defaults: values that config.json may omit.
        unless: keys that change the architecture when they are true.
        stack: name of the list of decoder layers.
        embeddings: names of the embeddings of tokens, and of positions if they are learned.
        head: name of the output layer.
    """

    attention: tuple[str, ...] = ("self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj", "self_attn.o_proj")
    mlp: tuple[str, ...] = ("mlp.gate_proj", "mlp.up_proj", "mlp.down_proj")
    gated: bool = True
    qkv_bias: Flag = False
    out_bias: Flag = False
    mlp_bias: Flag = False
    qk_norm: str = ""
    norms: int = 2
    rms: bool = True
    eager: bool = False
    head_bias: bool = False
    positions: bool = False
    expert_width: str = ""
    shared_expert: str = ""
    tied: bool = False
    defaults: Mapping[str, Any] = field(default_factory=dict)
    unless: tuple[str, ...] = ()
    stack: str = "model.layers"
    embeddings: tuple[str, ...] = ("model.embed_tokens",)
    head: str = "lm_head"


def kv_heads(count: int) -> dict[str, Any]:
    """Return the default number of key-value heads, for families in which it is not that of the queries."""
    return {"num_key_value_heads": count}


LLAMA = Family(qkv_bias="attention_bias", out_bias="attention_bias", mlp_bias="mlp_bias")
GEMMA = Family(
    qkv_bias="attention_bias", out_bias="attention_bias", tied=True,
    defaults={"head_dim": 256, "hidden_act": "gelu_pytorch_tanh"},
)  # fmt: skip
PLAIN = Family(gated=False, qkv_bias=True, out_bias=True, mlp_bias=True, rms=False)
FAMILIES = {
    "llama": LLAMA,
    "mistral": Family(defaults=kv_heads(8)),
    "mixtral": Family(
        expert_width="intermediate_size",
        defaults=kv_heads(8) | {"num_local_experts": 8, "num_experts_per_tok": 2},
    ),
    "qwen2": Family(qkv_bias=True, defaults=kv_heads(32)),
    "qwen2_moe": Family(
        qkv_bias="qkv_bias", expert_width="moe_intermediate_size", shared_expert="shared_expert_intermediate_size",
        defaults=kv_heads(16) | {"qkv_bias": True},
    ),
    "qwen3": Family(
        qkv_bias="attention_bias", out_bias="attention_bias", qk_norm="head",
        defaults=kv_heads(32) | {"head_dim": 128},
    ),
    "qwen3_moe": Family(
        qkv_bias="attention_bias", out_bias="attention_bias", qk_norm="head",
        expert_width="moe_intermediate_size", defaults=kv_heads(4),
    ),
    "gemma": replace(GEMMA, defaults={**GEMMA.defaults, **kv_heads(16)}),
    "gemma2": replace(GEMMA, norms=4, eager=True, defaults={**GEMMA.defaults, **kv_heads(4)}),
    "gemma3_text": replace(
        GEMMA, norms=4, qk_norm="head",
        defaults={**GEMMA.defaults, **kv_heads(4), "num_attention_heads": 8, "vocab_size": 262_208},
    ),
    "granite": LLAMA,
    "smollm3": replace(LLAMA, tied=True, defaults=kv_heads(4)),
    "olmo2": Family(qkv_bias="attention_bias", out_bias="attention_bias", qk_norm="all"),
    "phi3": Family(("self_attn.qkv_proj", "self_attn.o_proj"), ("mlp.gate_up_proj", "mlp.down_proj")),
    "phi": replace(
        PLAIN, attention=(*LLAMA.attention[:3], "self_attn.dense"), mlp=("mlp.fc1", "mlp.fc2"), norms=1,
        head_bias=True, defaults={"hidden_act": "gelu_new"}, unless=("qk_layernorm",),
    ),
    "starcoder2": replace(
        PLAIN, mlp=("mlp.c_fc", "mlp.c_proj"), qkv_bias="use_bias", out_bias="use_bias", mlp_bias="use_bias",
        tied=True, defaults=kv_heads(2) | {"use_bias": True, "hidden_act": "gelu_pytorch_tanh"},
    ),
    "gpt2": replace(
        PLAIN, attention=("attn.c_attn", "attn.c_proj"), mlp=("mlp.c_fc", "mlp.c_proj"), positions=True, tied=True,
        defaults={"activation_function": "gelu_new"}, unless=("add_cross_attention",),
        stack="transformer.h", embeddings=("transformer.wte", "transformer.wpe"),
    ),
    "gpt_neox": replace(
        PLAIN, attention=("attention.query_key_value", "attention.dense"), qkv_bias="attention_bias",
        out_bias="attention_bias", mlp=("mlp.dense_h_to_4h", "mlp.dense_4h_to_h"),
        defaults={"attention_bias": True, "hidden_act": "gelu"},
        stack="gpt_neox.layers", embeddings=("gpt_neox.embed_in",),
    ),
}  # fmt: skip
