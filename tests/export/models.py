"""Small bases and adapters for merging: sharded, of two architectures, with and without tied embeddings."""

from __future__ import annotations

import shutil
from pathlib import Path

import torch
from peft import LoraConfig, get_peft_model
from transformers import AutoModelForCausalLM, Qwen2Config, Qwen2ForCausalLM

from tests.conftest import save_tiny_model

LLAMA = ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"]


def sharded_llama(folder: Path, tied: bool = False, dtype: torch.dtype = torch.bfloat16) -> Path:
    """The tiny Llama in several shards of 16-bit weights."""
    tiny = save_tiny_model(folder / "tiny")
    model = AutoModelForCausalLM.from_pretrained(tiny, dtype=dtype)
    if tied:
        model.config.tie_word_embeddings = True
        model.tie_weights()
    return _save(model, tiny, folder / f"llama{'-tied' * tied}")


def sharded_qwen(folder: Path, tied: bool = True, dtype: torch.dtype = torch.bfloat16) -> Path:
    """A Qwen2, which has biases and usually ties its embeddings."""
    tiny = save_tiny_model(folder / "tiny")
    torch.manual_seed(1)
    config = Qwen2Config(
        vocab_size=261,
        hidden_size=64,
        intermediate_size=160,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        max_position_embeddings=512,
        tie_word_embeddings=tied,
        initializer_range=0.2,
    )
    return _save(Qwen2ForCausalLM(config).to(dtype), tiny, folder / f"qwen{'-tied' * tied}")


def _save(model: torch.nn.Module, tiny: Path, folder: Path) -> Path:
    model.save_pretrained(folder, max_shard_size="60KB")
    for path in (*tiny.glob("tokenizer*"), tiny / "chat_template.jinja"):
        shutil.copyfile(path, folder / path.name)
    assert len(list(folder.glob("model-*-of-*.safetensors"))) > 2
    return folder


def save_adapter(base: Path, folder: Path, seed: int = 0, size: float = 0.05, **settings: object) -> Path:
    """A LoRA adapter with random A and B, saved by PEFT itself."""
    torch.manual_seed(seed)
    model = AutoModelForCausalLM.from_pretrained(base, dtype=torch.float32)
    config = LoraConfig(**{"r": 4, "lora_alpha": 8, "target_modules": LLAMA, "task_type": "CAUSAL_LM", **settings})
    tuned = get_peft_model(model, config)
    for name, parameter in tuned.named_parameters():
        if "lora_B" in name:
            parameter.data.normal_(0, size)
        elif "modules_to_save" in name:
            parameter.data.add_(torch.randn_like(parameter) * size)
    tuned.save_pretrained(folder)
    return folder
