"""Read adapter_config.json: what can be merged, and with which factor."""

from __future__ import annotations

import math
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from peft.utils.other import get_pattern_key

from folora_q.errors import UserError, first_line
from folora_q.models.quantization import Quantization
from folora_q.models.trust import ADAPTER_CONFIG
from folora_q.recipe.paths import short
from folora_q.storage.untrusted import finite, read_object

# Settings of LoraConfig with which ΔW is not s B A, or the base changes.
UNSUPPORTED = (
    "use_dora",
    "use_qalora",
    "use_bdlora",
    "lora_bias",
    "layer_replication",
    "trainable_token_indices",
    "target_parameters",
    "arrow_config",
    "kasa_config",
    "monteclora_config",
    "velora_config",
)
# Initializations that change the base's weights: the adapter then needs a base that is not on disk.
REBASING_STARTS = ("pissa", "olora", "corda", "loftq", "eva", "lora_ga")


@dataclass(frozen=True)
class AdapterConfig:
    """The settings that a merge needs.

    Attributes:
        base, revision: the model that it belongs to; "" if it names none.
        quantization: of the base in training, as folora-q writes it; None for an adapter trained elsewhere.
    """

    path: Path
    base: str
    revision: str | None
    quantization: Quantization | None
    values: dict[str, Any]

    def rank(self, module: str) -> int:
        """Return the rank of a module's pair.

        Raises:
            UserError: it is not a positive integer.
        """
        value = self._of("rank_pattern", "r", module)
        if not value.is_integer() or value < 1:
            raise UserError(f"{self.path}: the rank of {short(module)} is {value:g}, not a positive integer")
        return int(value)

    def scale(self, module: str) -> float:
        """Return s of a module, where ΔW = s B A."""
        rank = self.rank(module)
        return self._of("alpha_pattern", "lora_alpha", module) / (
            math.sqrt(rank) if self.values.get("use_rslora") else rank
        )

    def _of(self, pattern: str, default: str, module: str) -> float:
        patterns = self.values.get(pattern) or {}
        value = finite(patterns.get(get_pattern_key(list(patterns), module), self.values.get(default)))
        if value is None:
            raise UserError(f"{self.path} has no number for {default} of {short(module)}")
        return value


def read_adapter_config(folder: Path) -> AdapterConfig:
    """Read the configuration of an adapter; `check_adapter` checks its patterns.

    Raises:
        UserError: it cannot be read, or is not that of a LoRA adapter that s B A can represent.
    """
    path = folder / ADAPTER_CONFIG
    try:
        values = read_object(path)
        if not isinstance(values.get("peft_type"), str):
            raise ValueError("it has no peft_type")
    except (OSError, ValueError) as error:
        raise UserError(f"{folder} is not an adapter: {ADAPTER_CONFIG} cannot be read ({first_line(error)})") from None
    _refuse_unsupported(folder, values)
    base, revision = values.get("base_model_name_or_path"), values.get("revision")
    if not isinstance(base, str | None) or not isinstance(revision, str | None):
        raise UserError(f"{path}: base_model_name_or_path and revision must be names")
    for pattern in ("rank_pattern", "alpha_pattern"):
        if not isinstance(values.get(pattern) or {}, dict):
            raise UserError(f"{path}: {pattern} must map module names to numbers")
    mapping = values.get("auto_mapping")
    held = mapping.get("quantization_config") if isinstance(mapping, dict) else None
    try:
        quantization = Quantization.from_dict(held) if isinstance(held, dict) else None
    except ValueError as error:
        raise UserError(f"{path}: quantization_config {error}") from None
    return AdapterConfig(path, base or "", revision, quantization, values)


def _refuse_unsupported(folder: Path, values: dict[str, Any]) -> None:
    if values["peft_type"] != "LORA":
        raise UserError(f"{folder} is a {short(values['peft_type'])} adapter; only LoRA can be merged")
    if used := next((name for name in UNSUPPORTED if values.get(name)), None):
        raise UserError(f"{folder} was trained with {used}, which cannot be merged here", "merge it with PEFT itself")
    if values.get("bias", "none") != "none":
        raise UserError(
            f"{folder} also contains trained biases, which cannot be merged here", "merge it with PEFT itself"
        )
    start = str(values.get("init_lora_weights", "")).lower()
    if start.startswith(REBASING_STARTS):
        raise UserError(
            f"{folder} started with init_lora_weights={short(start)}, which changes the base's own weights",
            "convert it with PEFT's path_initial_model_for_weight_conversion first",
        )
