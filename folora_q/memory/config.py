"""Read a model's config.json from a folder, hub id, GGUF file or the demo's model. No weights are downloaded."""

from __future__ import annotations

import logging
from pathlib import Path
from typing import Any

from folora_q.errors import UserError, first_line
from folora_q.memory.gguf_header import gguf_config
from folora_q.recipe.hub import hub_problem
from folora_q.storage.untrusted import read_object

# The configuration of the demo's model (folora_q.models.demo), so that an estimate downloads nothing.
DEMO_MODEL = "demo/SmolLM2-135M-Instruct"
DEMO_CONFIG = {
    "model_type": "llama",
    "hidden_size": 576,
    "intermediate_size": 1536,
    "num_hidden_layers": 30,
    "num_attention_heads": 9,
    "num_key_value_heads": 3,
    "vocab_size": 49_152,
    "tie_word_embeddings": True,
}


def read_config(name: str, revision: str | None = None) -> dict[str, Any]:
    """Read the configuration of `model.model_name_or_path`, which loading a recipe has checked.

    Raises:
        UserError: there is none, or it cannot be read.
    """
    if name == DEMO_MODEL:
        return dict(DEMO_CONFIG)
    path = Path(name)
    if path.suffix == ".gguf":
        return gguf_config(path)
    return _read(path / "config.json" if path.is_dir() else _from_the_hub(name, revision))


def files_here(name: str, revision: str | None = None) -> Path | None:
    """Return the folder with a model's config.json, local or in the hub's cache; None if neither has it."""
    path = Path(name)
    if path.is_dir():
        return path
    if name == DEMO_MODEL or path.suffix == ".gguf":
        return None
    kept = _kept(name, revision)
    return None if kept is None else kept.parent


def config_here(name: str, revision: str | None = None) -> dict[str, Any] | None:
    """Read the configuration as `read_config`, without contacting a hub; None if only the hub has it.

    Raises:
        UserError: it cannot be read.
    """
    if name == DEMO_MODEL or Path(name).suffix == ".gguf":
        return read_config(name)
    folder = files_here(name, revision)
    return None if folder is None else _read(folder / "config.json")


def _read(file: Path) -> dict[str, Any]:
    try:
        config = read_object(file)
    except (OSError, ValueError) as error:
        raise UserError(f"cannot read {file}: {first_line(error)}") from None
    text = config.get("text_config") or config
    if not isinstance(text, dict) or not isinstance(text.get("model_type", config.get("model_type")), str):
        raise UserError(f"{file} has no model_type, so it is not a model configuration")
    return config


def _from_the_hub(name: str, revision: str | None) -> Path:
    from huggingface_hub import hf_hub_download

    logging.getLogger("huggingface_hub").setLevel(logging.ERROR)  # it logs every attempt
    if (kept := _kept(name, revision)) is not None:
        return kept
    try:
        return Path(hf_hub_download(name, "config.json", revision=revision))
    except Exception as error:  # the hub client raises whatever its transport does
        problem = hub_problem(name, error) or (
            f"cannot get config.json of {name}: {first_line(error)}",
            "an estimate needs only that file: put it into a folder, and add model.model_name_or_path=FOLDER",
        )
        raise UserError(*problem) from None


def _kept(name: str, revision: str | None) -> Path | None:
    from huggingface_hub import try_to_load_from_cache

    kept = try_to_load_from_cache(name, "config.json", revision=revision)
    return Path(kept) if isinstance(kept, str) else None
