"""Check what a recipe names as its model: a folder, a .gguf file or a hub id. Says what else is there instead."""

from __future__ import annotations

from pathlib import Path

from folora_q.recipe.paths import HUB_MODEL, NotFoundError, absolute, exists, near, short
from folora_q.storage.untrusted import read_object

WEIGHTS = (".safetensors", ".bin", ".pt", ".pth", ".ckpt")
FORMS = "name a hub id, a folder with config.json, or a .gguf file"


def find_model(folder: Path, value: str) -> str:
    """Return the absolute path of a local model; a hub id as it is.

    Args:
        folder: the folder that a path is relative to.

    Raises:
        NotFoundError: it is neither.
    """
    path = absolute(folder, value)
    if exists(path) and path.is_dir():
        if not (path / "config.json").is_file():
            raise _not_a_model(path)
        return str(path)
    if exists(path):
        if path.suffix == ".gguf":
            return str(path)
        meant = f"name its folder: {path.parent}" if path.suffix in WEIGHTS else FORMS
        raise NotFoundError(f"{path} is a file, but not a .gguf file", meant)
    if path.suffix == ".gguf" or value.startswith(("/", "./", "../", "~")) or not value:
        raise NotFoundError(f"no model at {short(path)}{near(path)}")
    if exists(Path(value)):  # a hub id by its form, but more likely a path that is relative to another folder
        raise NotFoundError(f"no model at {short(path)}; the working directory has {value}, at {Path(value).resolve()}")
    if not HUB_MODEL.fullmatch(value):
        raise NotFoundError(f"{short(value)} is neither a file or folder here nor a hub id", FORMS)
    return value


def _not_a_model(path: Path) -> NotFoundError:
    """Return the error for a folder without config.json, by what it holds instead."""
    if (path / "adapter_config.json").is_file():
        base = base_of_adapter(path)
        again = f"to train another adapter, name the base: model.model_name_or_path={base}; " if base else ""
        hint = f"{again}to train the next task on this one, name it as model.adapter and its base here"
        return NotFoundError(f"{path} is a LoRA adapter{f' on {base}' if base else ''}, not a model", hint)
    if (path / "run.json").is_file():
        if (path / "merged" / "config.json").is_file():
            return NotFoundError(f"{path} is a run, not a model", f"did you mean its merged model, {path / 'merged'}?")
        hint = f"to train the next task on its result, name it as model.adapter, and its base model here: {path}"
        return NotFoundError(f"{path} is a run, not a model", hint)
    inside = [
        *sorted(file.parent for pattern in ("*/config.json", "snapshots/*/config.json") for file in path.glob(pattern)),
        *sorted(path.glob("*.gguf")),
    ]
    hint = f"did you mean {inside[0]}?" if inside else FORMS
    return NotFoundError(f"{path} has no config.json, so it is not a model folder", hint)


def base_of_adapter(folder: Path) -> str | None:
    """Return the base model that a folder's adapter_config.json names, if any."""
    try:
        name = read_object(folder / "adapter_config.json").get("base_model_name_or_path")
    except (OSError, ValueError):
        return None
    return short(name) if isinstance(name, str) and name else None
