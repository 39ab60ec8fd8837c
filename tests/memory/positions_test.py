"""How long a text a model can read: from config.json, and tried out."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from transformers import CONFIG_MAPPING, AutoModelForCausalLM

from folora_q.memory.positions import TABLES, Positions, positions_of

ROPE = {"model_type": "qwen2", "max_position_embeddings": 32768}
YARN = {"rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": 32768}
MISTRAL = {"model_type": "mistral", "max_position_embeddings": 32768}


@pytest.mark.parametrize(
    ("config", "count"),
    [
        (ROPE, 32768),
        (ROPE | {"rope_scaling": YARN}, 131072),
        (ROPE | {"rope_parameters": YARN}, 131072),
        (ROPE | {"max_position_embeddings": 131072, "rope_scaling": YARN}, 131072),
        (ROPE | {"max_position_embeddings": 4096, "rope_scaling": {"type": "linear", "factor": 4.0}}, 16384),
        (ROPE | {"max_position_embeddings": 131072, "rope_scaling": {"rope_type": "llama3", "factor": 8.0}}, 131072),
        (ROPE | {"max_position_embeddings": 131072, "rope_scaling": {"type": "longrope", "long_factor": [1]}}, 131072),
        ({"model_type": "gemma3", "text_config": {"model_type": "gemma3_text", "max_position_embeddings": 131072,
          "rope_parameters": {"full_attention": {"rope_type": "linear", "factor": 8.0},
                              "sliding_attention": {"rope_type": "default"}}}}, 131072),
        (MISTRAL | {"sliding_window": None}, 32768),
        (ROPE | {"sliding_window": 4096, "use_sliding_window": False}, 32768),
        (ROPE | {"sliding_window": 4096, "layer_types": ["full_attention", "sliding_attention"]}, 32768),
    ],
)  # fmt: skip
def test_scaled_rotary_positions_reach_further(config: dict[str, Any], count: int) -> None:
    found = positions_of(config)
    assert found is not None and (found.count, found.table) == (count, False)


@pytest.mark.parametrize(
    "config",
    [
        {"model_type": "bloom", "seq_length": 2048},
        {"model_type": "falcon", "alibi": True, "max_position_embeddings": 2048},
        {"model_type": "mamba2"},
        MISTRAL | {"sliding_window": 4096},
        ROPE | {"sliding_window": 4096, "layer_types": ["sliding_attention"] * 2},
    ],
)
def test_without_positions_or_behind_a_window_there_is_no_limit(config: dict[str, Any]) -> None:
    assert positions_of(config) is None


SIZES = {
    "vocab_size": 64, "hidden_size": 32, "n_embd": 32, "num_hidden_layers": 1, "n_layer": 1, "num_layers": 1,
    "num_attention_heads": 4, "n_head": 4, "num_heads": 4, "intermediate_size": 32, "ffn_dim": 32, "dff": 32,
    "word_embed_proj_dim": 32, "attention_types": [[["global"], 1]], "rotary_dim": 4,
    "max_position_embeddings": 24, "n_positions": 24, "pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2,
}  # fmt: skip


@pytest.mark.parametrize("kind", sorted(TABLES - {"git", "imagegpt", "gpt-sw3"}))
def test_a_table_of_positions_has_an_end(kind: str) -> None:
    known = CONFIG_MAPPING[kind]().to_dict()
    config = {"model_type": kind} | {key: value for key, value in SIZES.items() if key in known or key == "n_positions"}
    model = AutoModelForCausalLM.from_config(CONFIG_MAPPING[kind].from_dict(config)).eval()
    assert positions_of(model.config.to_dict()) == Positions(24, table=True)
    ids = torch.randint(3, 60, (1, 40))
    with torch.no_grad():
        model(ids[:, :24])
        with pytest.raises((IndexError, RuntimeError)):
            model(ids)
