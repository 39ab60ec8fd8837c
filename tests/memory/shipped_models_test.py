"""The shipped numbers are those of the published models, and give the estimate that their config.json gives."""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any

import pytest

from folora_q.memory.config import read_config
from folora_q.memory.estimate import estimate
from folora_q.memory.shapes import shape_of
from folora_q.memory.shapes_from_meta import shape_of_parameters
from folora_q.memory.shipped_models import FILE, ShippedModel, shipped_model, shipped_models
from tests.memory.recipes import a_recipe

MODELS = shipped_models()
# config.json in full, as published, of a model that is in our table and of one that is not.
QWEN = {
    "architectures": ["Qwen2ForCausalLM"],
    "attention_dropout": 0.0,
    "bos_token_id": 151643,
    "eos_token_id": 151645,
    "hidden_act": "silu",
    "hidden_size": 3584,
    "initializer_range": 0.02,
    "intermediate_size": 18944,
    "max_position_embeddings": 32768,
    "max_window_layers": 28,
    "model_type": "qwen2",
    "num_attention_heads": 28,
    "num_hidden_layers": 28,
    "num_key_value_heads": 4,
    "rms_norm_eps": 1e-06,
    "rope_theta": 1000000.0,
    "sliding_window": 131072,
    "tie_word_embeddings": False,
    "torch_dtype": "bfloat16",
    "transformers_version": "4.43.1",
    "use_cache": True,
    "use_sliding_window": False,
    "vocab_size": 152064,
}
LLAMA = {
    "architectures": ["LlamaForCausalLM"],
    "attention_bias": False,
    "attention_dropout": 0.0,
    "bos_token_id": 128000,
    "eos_token_id": [128001, 128008, 128009],
    "hidden_act": "silu",
    "hidden_size": 4096,
    "initializer_range": 0.02,
    "intermediate_size": 14336,
    "max_position_embeddings": 131072,
    "mlp_bias": False,
    "model_type": "llama",
    "num_attention_heads": 32,
    "num_hidden_layers": 32,
    "num_key_value_heads": 8,
    "pretraining_tp": 1,
    "rms_norm_eps": 1e-05,
    "rope_scaling": {
        "factor": 8.0,
        "low_freq_factor": 1.0,
        "high_freq_factor": 4.0,
        "original_max_position_embeddings": 8192,
        "rope_type": "llama3",
    },
    "rope_theta": 500000.0,
    "tie_word_embeddings": False,
    "torch_dtype": "bfloat16",
    "use_cache": True,
    "vocab_size": 128256,
}
GEMMA = {
    "architectures": ["Gemma3ForConditionalGeneration"],
    "boi_token_index": 255999,
    "eoi_token_index": 256000,
    "eos_token_id": [1, 106],
    "image_token_index": 262144,
    "initializer_range": 0.02,
    "mm_tokens_per_image": 256,
    "model_type": "gemma3",
    "text_config": {
        "hidden_size": 3840,
        "intermediate_size": 15360,
        "model_type": "gemma3_text",
        "num_attention_heads": 16,
        "num_hidden_layers": 48,
        "num_key_value_heads": 8,
        "rope_scaling": {"factor": 8.0, "rope_type": "linear"},
        "sliding_window": 1024,
    },
    "torch_dtype": "bfloat16",
    "vision_config": {
        "hidden_size": 1152,
        "image_size": 896,
        "intermediate_size": 4304,
        "model_type": "siglip_vision_model",
        "num_attention_heads": 16,
        "num_hidden_layers": 27,
        "patch_size": 14,
        "vision_use_head": False,
    },
}


def peaks(config: dict[str, Any]) -> list[int]:
    """The memory of all stages of a run with the model of a configuration."""
    if config["model_type"] == "gemma3":
        from folora_q.models.meta import parameter_shapes

        shape = shape_of_parameters(*parameter_shapes(config))
    else:
        shape = shape_of(config)
    return [stage.on_device for stage in estimate(a_recipe(), shape).stages]


@pytest.mark.parametrize("model", MODELS, ids=lambda model: model.ids[0])
def test_transformers_builds_a_model_of_the_published_size(model: ShippedModel) -> None:
    import torch
    from transformers import AutoConfig, AutoModelForCausalLM

    config = AutoConfig.for_model(**model.config)
    with torch.device("meta"):
        built = AutoModelForCausalLM.from_config(config)
    assert sum(parameter.numel() for parameter in built.parameters()) == model.parameters


@pytest.mark.parametrize(
    ("name", "config"),
    [
        ("Qwen/Qwen2.5-7B-Instruct", QWEN),
        ("meta-llama/Llama-3.1-8B-Instruct", LLAMA),
        ("google/gemma-3-12b-it", GEMMA),
    ],
    ids=lambda value: value if isinstance(value, str) else "",
)
def test_the_estimate_is_that_of_config_json(name: str, config: dict[str, Any], tmp_path: Path) -> None:
    (tmp_path / "config.json").write_text(json.dumps(config), encoding="utf-8")
    model = shipped_model(name)
    assert model is not None
    assert peaks(model.config) == peaks(read_config(str(tmp_path)))


@pytest.mark.parametrize("model", MODELS, ids=lambda model: model.ids[0])
def test_a_folder_with_the_numbers_gives_the_same_estimate(model: ShippedModel, tmp_path: Path) -> None:
    full = model.config | {"torch_dtype": "bfloat16", "use_cache": True, "sliding_window": None}
    (tmp_path / "config.json").write_text(json.dumps(full), encoding="utf-8")
    assert peaks(read_config(str(tmp_path))) == peaks(read_config(model.ids[-1]))


def test_ids_are_named_once_and_ignore_case() -> None:
    ids = [name.lower() for model in MODELS for name in model.ids]
    assert len(ids) == len(set(ids))
    assert shipped_model("QWEN/qwen3-8b") is shipped_model("Qwen/Qwen3-8B") is not None
    assert shipped_model("Qwen/Qwen3-8B-GGUF") is None


def test_the_file_says_when_and_from_where() -> None:
    read = json.loads(FILE.read_text("utf-8"))
    assert re.fullmatch(r"\d{4}-\d\d-\d\d", read["date"])
    assert "tests/memory/shipped_models_test.py" in read["source"]


def test_the_docs_list_them() -> None:
    page = (Path(__file__).parents[2] / "docs" / "memory.md").read_text("utf-8")
    for model in MODELS:
        assert f"| {', '.join(f'`{name}`' for name in model.ids)} | {model.parameters:,} |" in page
