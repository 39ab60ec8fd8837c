"""A tiny model with random weights for every architecture that people fine-tune on a card of 8 to 24 GB."""

from __future__ import annotations

from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
import transformers
from transformers import AutoModelForCausalLM, BitsAndBytesConfig, PreTrainedModel

from tests.conftest import tiny_tokenizer
from tests.models.load_test import write_gguf

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
        gguf: it is published as a GGUF file.
        refused: a part of what `validate` says where it cannot be fine-tuned.
    """

    title: str
    architecture: str
    settings: dict[str, Any] = field(default_factory=dict)
    sizes: dict[str, Any] = field(default_factory=lambda: SIZES)
    shards: bool = False
    quantized: dict[str, Any] | None = None
    gguf: bool = False
    refused: str = ""

    def save(self, folder: Path) -> Path:
        """Make the model, and save it as it would be published, with a tokenizer.

        Returns:
            The folder, or the file.
        """
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
            tiny_tokenizer().save_pretrained(folder / "16-bit")
        tiny_tokenizer().save_pretrained(folder)
        if self.gguf:
            write_gguf(folder, folder.with_suffix(".gguf"))
            return folder.with_suffix(".gguf")
        return folder


def gpt_sizes(**names: str) -> dict[str, Any]:
    """`SIZES` by the names that an older configuration has for them; what it has no name for is left out."""
    own = {names.get(key, key): value for key, value in SIZES.items()}
    return {key: value for key, value in own.items() if key}


def sees(text: dict[str, Any], eyes: dict[str, Any], **settings: Any) -> dict[str, Any]:
    """Settings of a model that also sees."""
    return {"text_config": {**SIZES, **text}, "vision_config": eyes, **settings}


ROUTED = {"num_local_experts": 4, "num_experts_per_tok": 2}
SLIDING = {"head_dim": 16, "sliding_window": 64}
LINEAR_ATTENTION = {
    "head_dim": 16,
    "layer_types": ["linear_attention", "full_attention"],
    "linear_num_value_heads": 4,
    "linear_num_key_heads": 2,
    "linear_key_head_dim": 16,
    "linear_value_head_dim": 16,
}
QWEN_EYES = {
    "depth": 1,
    "hidden_size": 32,
    "intermediate_size": 64,
    "num_heads": 2,
    "patch_size": 14,
    "out_hidden_size": 64,
    "num_position_embeddings": 16,
}
MROPE = {"rope_type": "default", "rope_theta": 1e6, "mrope_section": [2, 3, 3]}
QWEN_TOKENS = {"image_token_id": 257, "video_token_id": 258, "vision_start_token_id": 259, "vision_end_token_id": 260}

MEMBERS: dict[str, Member] = {
    "llama": Member("Llama 2, 3.x", "LlamaForCausalLM", shards=True),
    "llama-tied": Member("Llama 3.2 1B, 3B", "LlamaForCausalLM", {"tie_word_embeddings": True}),
    "mistral": Member("Mistral 7B, Nemo", "MistralForCausalLM", {"sliding_window": 64}),
    "mistral3": Member(
        "Mistral Small 3.x, Ministral 3",
        "Mistral3ForConditionalGeneration",
        sees(
            {"model_type": "ministral3", "head_dim": 16, "tie_word_embeddings": False},
            {"model_type": "pixtral", **EYES},
            image_token_index=257,
            tie_word_embeddings=False,
        ),
        sizes={},
    ),
    "qwen2": Member("Qwen2, Qwen2.5", "Qwen2ForCausalLM", {"tie_word_embeddings": True}, shards=True),
    "qwen2.5-vl": Member(
        "Qwen2.5-VL",
        "Qwen2_5_VLForConditionalGeneration",
        sees(
            {"rope_parameters": MROPE},
            {key: value for key, value in QWEN_EYES.items() if key != "num_position_embeddings"},
            **QWEN_TOKENS,
        ),
        sizes={},
    ),
    "qwen3": Member("Qwen3", "Qwen3ForCausalLM", {"head_dim": 16, "tie_word_embeddings": True}),
    "qwen3-moe": Member("Qwen3-30B-A3B", "Qwen3MoeForCausalLM", {"head_dim": 16, "num_experts": 4, **EXPERTS}),
    "qwen3-vl": Member(
        "Qwen3-VL",
        "Qwen3VLForConditionalGeneration",
        sees(
            {
                "head_dim": 16,
                "rope_parameters": {"rope_type": "default", "rope_theta": 1e6, "mrope_section": [2, 3, 3]},
            },
            {**QWEN_EYES, "deepstack_visual_indexes": [0]},
            **QWEN_TOKENS,
        ),
        sizes={},
    ),
    "qwen3-next": Member(
        "Qwen3-Next",
        "Qwen3NextForCausalLM",
        {"num_experts": 4, "shared_expert_intermediate_size": 32, **EXPERTS, **LINEAR_ATTENTION},
    ),
    "qwen3.5": Member(
        "Qwen3.5",
        "Qwen3_5ForConditionalGeneration",
        sees(
            {
                **LINEAR_ATTENTION,
                "rope_parameters": {"rope_type": "default", "rope_theta": 1e6, "mrope_section": [1, 1, 0]},
            },
            QWEN_EYES,
            **QWEN_TOKENS,
        ),
        sizes={},
    ),
    "mixtral": Member("Mixtral", "MixtralForCausalLM", ROUTED, shards=True),
    "gpt-oss": Member("gpt-oss, in 16 bits", "GptOssForCausalLM", {**ROUTED, **SLIDING}),
    "olmoe": Member("OLMoE", "OlmoeForCausalLM", {"num_experts": 4, "num_experts_per_tok": 2}),
    "granite-moe": Member("Granite 3 MoE", "GraniteMoeForCausalLM", {**ROUTED, "logits_scaling": 2.0}),
    "gemma2": Member("Gemma 2", "Gemma2ForCausalLM", SLIDING),
    "gemma3-text": Member("Gemma 3 270M, 1B", "Gemma3ForCausalLM", SLIDING),
    "gemma3": Member(
        "Gemma 3 4B, 12B, 27B",
        "Gemma3ForConditionalGeneration",
        sees(
            SLIDING,
            EYES,
            mm_tokens_per_image=4,
            image_token_index=257,
            boi_token_index=258,
            eoi_token_index=259,
        ),
        sizes={},
        shards=True,
    ),
    "gemma4": Member(
        "Gemma 4 E2B, E4B, 31B",
        "Gemma4ForConditionalGeneration",
        sees(
            {
                **SLIDING,
                "vocab_size_per_layer_input": WORDS,
                "hidden_size_per_layer_input": 8,
                "global_head_dim": 16,
                "layer_types": ["sliding_attention", "full_attention"],
            },
            {**EYES, "num_key_value_heads": 2, "head_dim": 16, "position_embedding_size": 64},
            audio_config=None,
            image_token_id=257,
            video_token_id=258,
            boi_token_id=259,
            eoi_token_id=260,
            audio_token_id=256,
        ),
        sizes={},
    ),
    "phi3": Member("Phi 3, Phi 4", "Phi3ForCausalLM"),
    "granite": Member("Granite 3, 4", "GraniteForCausalLM", {"tie_word_embeddings": True, "logits_scaling": 8.0}),
    "granite4-hybrid": Member(
        "Granite 4 H",
        "GraniteMoeHybridForCausalLM",
        {
            **ROUTED,
            "shared_intermediate_size": 32,
            "layer_types": ["mamba", "attention"],
            "mamba_n_heads": 4,
            "mamba_d_head": 32,
            "mamba_d_state": 16,
            "mamba_chunk_size": 16,
            "position_embedding_type": "rope",
        },
    ),
    "lfm2": Member("LFM2", "Lfm2ForCausalLM", {"layer_types": ["conv", "full_attention"], "block_multiple_of": 32}),
    "olmo2": Member("OLMo 2", "Olmo2ForCausalLM"),
    "smollm3": Member("SmolLM3", "SmolLM3ForCausalLM"),
    "falcon": Member(
        "Falcon 7B",
        "FalconForCausalLM",
        {"multi_query": True, "parallel_attn": True, "bias": False, "new_decoder_architecture": False, "alibi": False},
        sizes=gpt_sizes(intermediate_size="ffn_hidden_size", num_key_value_heads=""),
        refused="bitsandbytes",
    ),
    "gpt-neox": Member("GPT-NeoX, Pythia", "GPTNeoXForCausalLM", sizes=gpt_sizes(num_key_value_heads="")),
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
    "gguf": Member("a GGUF file (Llama)", "LlamaForCausalLM", gguf=True),
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
