"""Check what a recipe keeps before PyTorch is imported: its files, and what the chat template seems to lack."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

from folora_q.data.keep_files import read_keep_files
from folora_q.data.templates import read_template
from folora_q.memory.config import files_here
from folora_q.preflight.tokens import template_of
from folora_q.recipe import Recipe
from folora_q.recipe.capabilities import CAPABILITIES, Requirement

# Words without which a template cannot render what a capability requires.
WORDS: dict[Requirement, tuple[str, ...]] = {"tools": ("tools",), "thoughts": ("think", "reason")}


def examine_keep(recipe: Recipe) -> list[str]:
    """Return notes on capabilities that will be left out; where nothing is said, `train` renders and decides.

    Raises:
        UserError: a file cannot be used.
    """
    read_keep_files(recipe.keep.files)
    name = recipe.data.chat_template
    folder = files_here(recipe.model.model_name_or_path, recipe.model.revision)
    if not recipe.keep.capabilities or (name is None and folder is None):
        return []
    template = read_template(name) if name is not None else template_of(folder) if folder is not None else ""
    return list(_lacking(recipe, template))


def _lacking(recipe: Recipe, template: str) -> Iterator[str]:
    if not template.strip('" '):
        yield "keep: every capability is left out, as the model has no chat template"
        return
    for capability in recipe.keep.capabilities:
        requires = CAPABILITIES[capability].requires
        if not any(word in template for word in WORDS.get(requires, ("",))):
            yield f"keep: {capability} is left out: the chat template has no {requires}"


def kept_in_words(recipe: Recipe) -> str | None:
    """Return what is kept, for a list of a run's settings; None if nothing is."""
    keep = recipe.keep
    if not keep.active:
        return None
    names = ", ".join([*keep.capabilities, *(Path(file).name for file in keep.files)])
    if not keep.share or not recipe.gate.enabled:
        return f"{names}: only measured" + ("" if keep.share else " (keep.share: 0)")
    return f"{names}, {keep.share:.0%} of the penalty"
