"""Find a model's maximum sequence length from its config.json alone."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from folora_q.memory.model_families import FAMILIES
from folora_q.memory.shapes import Config, text_config
from folora_q.storage.untrusted import finite

# Models with a table of positions, learned or computed once: positions beyond it are an error.
TABLES = {
    "gpt2", "gpt_bigcode", "gpt_neo", "gptj", "codegen", "openai-gpt", "imagegpt", "opt", "biogpt", "ctrl", "git",
    "gpt-sw3",
}  # fmt: skip
# Names of the length in config.json; models without positions (ALiBi, recurrent ones) have none.
LENGTHS = ("max_position_embeddings", "n_positions", "n_ctx")
# Methods for which config.json has the length before scaling; for others it has the scaled one.
SCALING_LENGTH = {"linear", "dynamic", "yarn"}


@dataclass(frozen=True)
class Positions:
    """The positions of a model.

    Attributes:
        count: the number of tokens that it was made for, with the scaling of its rotary positions.
        table: further positions are an error, while rotary ones continue.
        reason: why `count` differs from the number in config.json; empty if it does not.
    """

    count: int
    table: bool
    reason: str = ""


def positions_of(config: Config) -> Positions | None:
    """Return the positions of a model by its config.json; None if it sets no limit."""
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


def longest_input(config: Config) -> int | None:
    """Return the length beyond which a model fails, in tokens; None if it only gets worse, or has no limit."""
    positions = positions_of(config)
    return positions.count if positions is not None and positions.table else None


def _slides_everywhere(text: Mapping[str, Any]) -> bool:
    """Return whether all layers attend only within a window, so that no two positions are further apart."""
    window, kinds = text.get("sliding_window"), text.get("layer_types")
    if not isinstance(window, int) or text.get("use_sliding_window") is False:
        return False
    if isinstance(kinds, list):
        return bool(kinds) and set(kinds) == {"sliding_attention"}
    return text.get("model_type") in ("mistral", "starcoder2", "mixtral")  # all others have both kinds of layers


def _rope(text: Mapping[str, Any]) -> list[Mapping[str, Any]]:
    """Return the settings of rotary positions; newer configurations have them for each kind of layer."""
    found = text.get("rope_parameters") or text.get("rope_scaling")
    if not isinstance(found, Mapping):
        return []
    nested = [each for each in found.values() if isinstance(each, Mapping)]
    return nested or [found]


def _scaled(count: int, rope: Mapping[str, Any], kind: str) -> int:
    """Return the number of tokens that scaled rotary positions reach."""
    method, factor = rope.get("rope_type", rope.get("type")), finite(rope.get("factor"))
    if method not in SCALING_LENGTH or factor is None or factor <= 1 or "gemma3" in kind:
        return count  # Gemma 3 has the length after scaling
    original = rope.get("original_max_position_embeddings")
    return int((original if type(original) is int else count) * factor)
