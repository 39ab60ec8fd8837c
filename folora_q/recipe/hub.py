"""Hub ids: what a misspelt one probably means, and why a hub did not deliver. Contacts no hub."""

from __future__ import annotations

import re
from collections.abc import Iterator
from difflib import get_close_matches
from pathlib import Path

from folora_q.errors import first_line
from folora_q.recipe.shipped import shipped_models

# A suggestion must be this similar, and have the same numbers: Qwen2.5-3B is not a misspelt Qwen2.5-7B.
MIN_SIMILARITY = 0.8
NUMBER = re.compile(r"\d+")


def similar_models(name: str) -> list[str]:
    """Return the model that a misspelt hub id probably means, of those in the hub's cache and in shipped recipes."""
    known = {*shipped_models(), *_models_in_cache()} - {name}
    by_name = {model.lower(): model for model in known if NUMBER.findall(model) == NUMBER.findall(name)}
    return [by_name[near] for near in get_close_matches(name.lower(), sorted(by_name), n=1, cutoff=MIN_SIMILARITY)]


def did_you_mean(name: str) -> str:
    """Return a question about a misspelt hub id, to be added to a sentence; empty if none is similar."""
    return "".join(f"; did you mean {model}?" for model in similar_models(name))


def hub_problem(name: str, error: BaseException) -> tuple[str, str] | None:
    """Say why a model could not be fetched and what to do about it; None if the error is not huggingface_hub's."""
    from huggingface_hub import is_offline_mode

    kinds = {kind.__name__ for each in _chain(error) for kind in type(each).__mro__}
    near = did_you_mean(name)
    if "GatedRepoError" in kinds:
        return (
            f"access to {name} must be granted by its authors",
            f"ask for it on https://huggingface.co/{name}, then log in with `hf auth login`, or set HF_TOKEN",
        )
    if "RevisionNotFoundError" in kinds:
        return f"the model {name} has no such revision", "correct model.revision, or remove it"
    if "RepositoryNotFoundError" in kinds:
        return (
            f"there is no model {name} on the hub, or it is private{near}",
            "check the spelling on https://huggingface.co/models; for a private model log in with `hf auth login`",
        )
    if "LocalEntryNotFoundError" in kinds or "OfflineModeIsEnabled" in kinds:
        local = "or name a local folder with the model's files (config.json is enough for an estimate)"
        if is_offline_mode():
            reason = "is not in the hub's cache, and HF_HUB_OFFLINE forbids to download it"
            return f"the model {name} {reason}{near}", f"check the spelling, unset HF_HUB_OFFLINE, {local}"
        reason = "is not in the hub's cache, and the hub cannot be reached"
        return f"the model {name} {reason}{near}", f"check the spelling and the connection, {local}"
    if "EntryNotFoundError" in kinds:
        return (
            f"{name} on the hub has no config.json, so it is not a model that can be loaded ({first_line(error)})",
            "is it a LoRA adapter, or GGUF files? name its base model, or download the .gguf file and name that",
        )
    return None


def _chain(error: BaseException) -> Iterator[BaseException]:
    """Yield an error and what caused it."""
    seen: set[int] = set()
    found: BaseException | None = error
    while found is not None and id(found) not in seen:
        seen.add(id(found))
        yield found
        found = found.__cause__ or found.__context__


def _models_in_cache() -> Iterator[str]:
    """Yield the ids of the models in the hub's cache, whose folders are called models--owner--name."""
    from huggingface_hub import constants

    try:
        folders = list(Path(constants.HF_HUB_CACHE).iterdir())
    except OSError:
        return
    for folder in folders:
        kind, *parts = folder.name.split("--")
        if kind == "models" and parts:
            yield "/".join(parts)
