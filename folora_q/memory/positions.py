"""Maximum sequence length of a model, from its config.json alone."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from folora_q.memory.model_families import FAMILIES
from folora_q.memory.shapes import Config, text_config
from folora_q.storage.untrusted import finite

# Models with a table of positions, learned or computed once: what lies beyond it is an error.
TABLES = {
    "gpt2", "gpt_bigcode", "gpt_neo", "gptj", "codegen", "openai-gpt", "imagegpt", "opt", "biogpt", "ctrl", "git",
    "gpt-sw3",
}  # fmt: skip
# How config.json calls the length; of a model without positions (ALiBi, recurrent ones) it says none.
LENGTHS = ("max_position_embeddings", "n_positions", "n_ctx")
# These scale a length that config.json gives unscaled; others give the one that is meant.
SCALING_LENGTH = {"linear", "dynamic", "yarn"}


@dataclass(frozen=True)
class Positions:
    """The positions of a model.

    Attributes:
        count: tokens that it was made for, with the scaling of its rotary positions.
        table: beyond them is an error, where rotary positions go on.
        reason: what makes `count` of the number in config.json; empty if nothing does.
    """

    count: int
    table: bool
    reason: str = ""


def positions_of(config: Config) -> Positions | None:
    """The positions that config.json gives a model; None where it sets no limit."""
    text = text_config(config)
    kind = str(text.get("model_type", ""))
    count = next((text[name] for name in LENGTHS if type(text.get(name)) is int and text[name] > 0), None)
    if count is None or text.get("alibi"):
        return None
    if kind in TABLES or (kind in FAMILIES and FAMILIES[kind].positions):
        return Positions(count, table=True)
    if _slides_everywhere(text):
        return None
    scaled = max((_scaled(count, rope, kind) for rope in _rope(text)), default=count)
    return Positions(max(count, scaled), False, "with its scaled rotary positions" if scaled > count else "")


def _slides_everywhere(text: Mapping[str, Any]) -> bool:
    """Whether no layer looks further back than a window: no two positions are ever further apart than that."""
    window, kinds = text.get("sliding_window"), text.get("layer_types")
    if not isinstance(window, int) or text.get("use_sliding_window") is False:
        return False
    if isinstance(kinds, list):
        return bool(kinds) and set(kinds) == {"sliding_attention"}
    return text.get("model_type") in ("mistral", "starcoder2", "mixtral")  # all others mix both kinds of layers


def _rope(text: Mapping[str, Any]) -> list[Mapping[str, Any]]:
    """The settings of rotary positions; newer configurations have some for each kind of layer."""
    found = text.get("rope_parameters") or text.get("rope_scaling")
    if not isinstance(found, Mapping):
        return []
    nested = [each for each in found.values() if isinstance(each, Mapping)]
    return nested or [found]


def _scaled(count: int, rope: Mapping[str, Any], kind: str) -> int:
    """The tokens that a scaled position's settings reach."""
    method, factor = rope.get("rope_type", rope.get("type")), finite(rope.get("factor"))
    if method not in SCALING_LENGTH or factor is None or factor <= 1 or "gemma3" in kind:
        return count  # Gemma 3 gives the length that its factor has reached
    original = rope.get("original_max_position_embeddings")
    return int((original if type(original) is int else count) * factor)
