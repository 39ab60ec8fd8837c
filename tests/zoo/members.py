"""A tiny model with random weights for every architecture that people fine-tune on a card of 8 to 24 GB."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
import transformers
from transformers import AutoModelForCausalLM, BitsAndBytesConfig, PreTrainedModel

from tests.conftest import tiny_tokenizer

WORDS = 261  # of the tiny tokenizer
SIZES: dict[str, Any] = {
    "vocab_size": WORDS,
    "hidden_size": 64,
    "intermediate_size": 96,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 512,
    "bos_token_id": 1,
    "eos_token_id": 2,
    "pad_token_id": 2,
    "initializer_range": 0.2,  # larger than usual, so that an untrained model still prefers some bytes
}
EXPERTS = {"num_experts_per_tok": 2, "moe_intermediate_size": 32}
EYES = {
    "hidden_size": 32,
    "intermediate_size": 64,
    "num_hidden_layers": 1,
    "num_attention_heads": 2,
    "image_size": 28,
    "patch_size": 14,
}


@dataclass(frozen=True)
class Member:
    """An architecture, as a checkpoint of it would be published.

    Attributes:
        title: what people call it.
        architecture: the class of transformers that config.json names.
        settings: of its configuration, besides `SIZES`.
        sizes: takes the place of `SIZES`.
        shards: more files than one.
        quantized: bitsandbytes' settings, for a checkpoint that is published in 4 bits.
        refused: a part of what `validate` says where it cannot be fine-tuned.
    """

    title: str
    architecture: str
    settings: dict[str, Any] = field(default_factory=dict)
    sizes: dict[str, Any] = field(default_factory=lambda: SIZES)
    shards: bool = False
    quantized: dict[str, Any] | None = None
    refused: str = ""

    def save(self, folder: Path) -> Path:
        """Make the model, and save it as it would be published, with a tokenizer."""
        torch.manual_seed(0)
        cls = getattr(transformers, self.architecture)
        model: PreTrainedModel = cls(cls.config_class(**{**self.sizes, **self.settings})).to(torch.bfloat16)
        size = "60KB" if self.shards else "1GB"
        if self.quantized is None:
            model.save_pretrained(folder, max_shard_size=size)
        else:
            model.save_pretrained(folder / "16-bit")
            config = BitsAndBytesConfig(load_in_4bit=True, bnb_4bit_compute_dtype=torch.bfloat16, **self.quantized)
            in_4_bits = AutoModelForCausalLM.from_pretrained(folder / "16-bit", quantization_config=config)
            in_4_bits.save_pretrained(folder, max_shard_size=size)
        tiny_tokenizer().save_pretrained(folder)
        return folder


def gpt_sizes(**names: str) -> dict[str, Any]:
    """`SIZES` by the names that an older configuration has for them; what it has no name for is left out."""
    own = {names.get(key, key): value for key, value in SIZES.items()}
    return {key: value for key, value in own.items() if key}


MEMBERS: dict[str, Member] = {
    "llama": Member("Llama 2, 3.x", "LlamaForCausalLM", shards=True),
    "llama-tied": Member("Llama 3.2 1B, 3B", "LlamaForCausalLM", {"tie_word_embeddings": True}),
    "mistral": Member("Mistral 7B, Nemo", "MistralForCausalLM", {"sliding_window": 64}),
    "qwen2": Member("Qwen2, Qwen2.5", "Qwen2ForCausalLM", {"tie_word_embeddings": True}, shards=True),
    "qwen3": Member("Qwen3", "Qwen3ForCausalLM", {"head_dim": 16, "tie_word_embeddings": True}),
    "qwen3-moe": Member("Qwen3-30B-A3B", "Qwen3MoeForCausalLM", {"head_dim": 16, "num_experts": 4, **EXPERTS}),
    "mixtral": Member("Mixtral", "MixtralForCausalLM", {"num_local_experts": 4, "num_experts_per_tok": 2}, shards=True),
    "gpt-oss": Member(
        "gpt-oss, in 16 bits",
        "GptOssForCausalLM",
        {"head_dim": 16, "num_local_experts": 4, "num_experts_per_tok": 2, "sliding_window": 64},
    ),
    "olmoe": Member("OLMoE", "OlmoeForCausalLM", {"num_experts": 4, "num_experts_per_tok": 2}),
    "granite-moe": Member(
        "Granite 3 MoE",
        "GraniteMoeForCausalLM",
        {"num_local_experts": 4, "num_experts_per_tok": 2, "logits_scaling": 2.0},
    ),
    "gemma2": Member("Gemma 2", "Gemma2ForCausalLM", {"head_dim": 16, "sliding_window": 64}),
    "gemma3-text": Member("Gemma 3 270M, 1B", "Gemma3ForCausalLM", {"head_dim": 16, "sliding_window": 64}),
    "gemma3": Member(
        "Gemma 3 4B, 12B, 27B",
        "Gemma3ForConditionalGeneration",
        {
            "text_config": {**SIZES, "head_dim": 16, "sliding_window": 64},
            "vision_config": EYES,
            "mm_tokens_per_image": 4,
            "image_token_index": 257,
            "boi_token_index": 258,
            "eoi_token_index": 259,
        },
        sizes={},
        shards=True,
    ),
    "phi3": Member("Phi 3, Phi 4", "Phi3ForCausalLM"),
    "granite": Member("Granite 3, 4", "GraniteForCausalLM", {"tie_word_embeddings": True, "logits_scaling": 8.0}),
    "olmo2": Member("OLMo 2", "Olmo2ForCausalLM"),
    "smollm3": Member("SmolLM3", "SmolLM3ForCausalLM"),
    "falcon": Member(
        "Falcon 7B",
        "FalconForCausalLM",
        {"multi_query": True, "parallel_attn": True, "bias": False, "new_decoder_architecture": False, "alibi": False},
        sizes=gpt_sizes(intermediate_size="ffn_hidden_size", num_key_value_heads=""),
    ),
    "gpt2": Member(
        "GPT-2",
        "GPT2LMHeadModel",
        sizes=gpt_sizes(
            hidden_size="n_embd",
            intermediate_size="n_inner",
            num_hidden_layers="n_layer",
            num_attention_heads="n_head",
            num_key_value_heads="",
            max_position_embeddings="n_positions",
        ),
    ),
    "opt": Member(
        "OPT",
        "OPTForCausalLM",
        {"word_embed_proj_dim": 64},
        sizes=gpt_sizes(intermediate_size="ffn_dim", num_key_value_heads="", initializer_range="init_std"),
    ),
    "qwen3-next": Member(
        "Qwen3-Next",
        "Qwen3NextForCausalLM",
        {
            "head_dim": 16,
            "num_experts": 4,
            "shared_expert_intermediate_size": 32,
            "layer_types": ["linear_attention", "full_attention"],
            "linear_num_value_heads": 4,
            "linear_num_key_heads": 2,
            "linear_key_head_dim": 16,
            "linear_value_head_dim": 16,
            **EXPERTS,
        },
    ),
    "nf4-double": Member(
        "bitsandbytes nf4, double quantization",
        "LlamaForCausalLM",
        quantized={"bnb_4bit_quant_type": "nf4", "bnb_4bit_use_double_quant": True},
    ),
    "nf4": Member(
        "bitsandbytes nf4",
        "LlamaForCausalLM",
        quantized={"bnb_4bit_quant_type": "nf4", "bnb_4bit_use_double_quant": False},
        shards=True,
    ),
    "fp4": Member(
        "bitsandbytes fp4",
        "LlamaForCausalLM",
        quantized={"bnb_4bit_quant_type": "fp4", "bnb_4bit_use_double_quant": False},
    ),
    "fp4-skipped": Member(
        "bitsandbytes fp4, double quantization, modules left out",
        "Qwen2ForCausalLM",
        {"tie_word_embeddings": True},
        quantized={
            "bnb_4bit_quant_type": "fp4",
            "bnb_4bit_use_double_quant": True,
            "llm_int8_skip_modules": ["lm_head", "model.layers.0.mlp.down_proj", "v_proj"],
        },
    ),
}
