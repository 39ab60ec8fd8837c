"""Recipes and configurations for estimates: nothing of them is fetched or read."""

from __future__ import annotations

from typing import Any

from folora_q.recipe import Recipe

# As on the hub; a part of it.
MISTRAL_7B = {
    "model_type": "mistral",
    "hidden_size": 4096,
    "intermediate_size": 14_336,
    "num_hidden_layers": 32,
    "num_attention_heads": 32,
    "num_key_value_heads": 8,
    "vocab_size": 32_768,
    "tie_word_embeddings": False,
    "sliding_window": None,
}
LLAMA_8B = MISTRAL_7B | {"model_type": "llama", "vocab_size": 128_256}
QWEN_7B = MISTRAL_7B | {
    "model_type": "qwen2",
    "hidden_size": 3584,
    "intermediate_size": 18_944,
    "num_hidden_layers": 28,
    "num_attention_heads": 28,
    "num_key_value_heads": 4,
    "vocab_size": 152_064,
}
SMALL_LLAMA = {
    "model_type": "llama",
    "hidden_size": 128,
    "intermediate_size": 256,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "vocab_size": 300,
}


def a_recipe(**sections: dict[str, Any]) -> Recipe:
    """A recipe with some sections' values set."""
    given = {
        "model": {"model_name_or_path": "unused"},
        "data": {"train_dataset": "unused"},
        "gate": {"rule": "step"},  # which takes the most
    }
    training = {"output_dir": "unused"} | sections.pop("training", {})
    for name, values in sections.items():
        given[name] = given.get(name, {}) | values
    return Recipe.model_validate(given | {"training": training})
