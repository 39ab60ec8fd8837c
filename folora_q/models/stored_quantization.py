"""Read config.json of a checkpoint saved in 4 bits. Needs neither PyTorch nor transformers."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from folora_q.errors import UserError
from folora_q.recipe.paths import short

QUANT_TYPES = ("nf4", "fp4")


@dataclass(frozen=True)
class StoredQuantization:
    """How bitsandbytes saved a checkpoint in 4 bits.

    Attributes:
        quant_type: nf4 or fp4.
        double_quant: the constants of the 4-bit blocks are quantized as well.
        skipped: modules that were left in 16 bits; None: transformers' own choice.
    """

    quant_type: str
    double_quant: bool
    skipped: tuple[str, ...] | None

    def __str__(self) -> str:
        return f"{self.quant_type}{', double quantization' * self.double_quant}"


def stored_quantization(config: Mapping[str, Any]) -> StoredQuantization | None:
    """Return the quantization of a checkpoint that bitsandbytes saved in 4 bits; None for any other.

    Args:
        config: config.json.

    Raises:
        UserError: a setting is invalid.
    """
    found = config.get("quantization_config")
    if not isinstance(found, Mapping) or not found.get("load_in_4bit"):
        return None
    if found.get("quant_method", "bitsandbytes") != "bitsandbytes":
        return None
    quant_type, skipped = found.get("bnb_4bit_quant_type", "fp4"), found.get("llm_int8_skip_modules")
    if quant_type not in QUANT_TYPES:
        raise UserError(f"config.json: bnb_4bit_quant_type is {short(quant_type)}, not {' or '.join(QUANT_TYPES)}")
    if skipped is not None and not (isinstance(skipped, list) and all(isinstance(name, str) for name in skipped)):
        raise UserError("config.json: llm_int8_skip_modules must be a list of module names")
    return StoredQuantization(
        quant_type,
        bool(found.get("bnb_4bit_use_double_quant", False)),
        None if skipped is None else tuple(skipped),
    )
