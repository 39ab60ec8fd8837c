"""Report optional packages that some commands use. Training needs none of them."""

from __future__ import annotations

from importlib.metadata import PackageNotFoundError, version
from pathlib import Path

from folora_q.doctor.findings import Finding, State
from folora_q.doctor.pip import pip_install
from folora_q.doctor.requirements import ordered, ranges, requirement, within
from folora_q.errors import UserError


def check_lm_eval() -> list[Finding]:
    """Check lm-eval, for `folora-q eval --tasks`."""
    specifier, install = ranges("eval").get("lm-eval"), pip_install(requirement("lm-eval", "eval"))
    try:
        found = version("lm-eval")
    except PackageNotFoundError:
        return [Finding("lm-eval", State.NOTE, "not installed; folora-q eval --tasks requires it", install)]
    if specifier is not None and not within(found, specifier):
        fact = f"{found}, outside {ordered(specifier)}, for folora-q eval --tasks"
        return [Finding("lm-eval", State.NOTE, fact, install)]
    return [Finding("lm-eval", State.GOOD, f"{found} (folora-q eval --tasks)")]


def check_gguf() -> list[Finding]:
    """Check llama.cpp's converter, for `folora-q merge --gguf`."""
    from folora_q.export.gguf import find_converter

    try:
        command = find_converter(None)
    except UserError as error:
        return [Finding("gguf", State.NOTE, "no converter; folora-q merge --gguf requires it", error.hint)]
    return [Finding("gguf", State.GOOD, f"{Path(command[-1]).name} (folora-q merge --gguf)")]


def check_flash_attention() -> list[Finding]:
    """Check flash-attn, which requires a GPU."""
    import torch

    if not torch.cuda.is_available():
        return []
    try:
        found = f"{version('flash-attn')} (model.attn_implementation: flash_attention_2)"
    except PackageNotFoundError:
        found = "not installed, and not needed: torch's own attention is used"
    return [Finding("flash-attn", State.NOTE, found)]
