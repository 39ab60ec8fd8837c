"""A LoRA adapter as PEFT saved it, ours or somebody else's, as the changes that it makes to weights."""

from __future__ import annotations

import json
import math
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from peft.utils.other import get_pattern_key
from safetensors import SafetensorError, safe_open
from torch import Tensor

from folora_q.errors import UserError
from folora_q.models.checkpoint import unpickled
from folora_q.models.trust import ADAPTER_CONFIG, NOTHING, PICKLED_ADAPTER, SAFE_ADAPTER, Trust, check_adapter

CONFIG = ADAPTER_CONFIG
WEIGHTS = SAFE_ADAPTER
PREFIX = "base_model.model."
# Settings of LoraConfig under which ΔW is not s B A, or the base is not what it was.
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
# Starts that change the base's weights: PEFT's adapter then fits a base that is nowhere on the disk.
REBASING_STARTS = ("pissa", "olora", "corda", "loftq", "eva", "lora_ga")


@dataclass(frozen=True)
class Delta:
    """The change of one weight: ΔW = scale B A, or its transpose where the base stores weights as (in, out).

    Attributes:
        a: (r, in). b: (out, r).
    """

    a: Tensor
    b: Tensor
    scale: float
    transposed: bool

    def dense(self, dtype: torch.dtype = torch.float32) -> Tensor:
        """ΔW in the shape of the weight, computed in `dtype`."""
        product = (self.b.to(dtype) @ self.a.to(dtype)) * self.scale
        return product.T if self.transposed else product


@dataclass(frozen=True)
class AdapterFile:
    """An adapter folder.

    Attributes:
        base, revision: the model that it belongs to.
        deltas: by the weight's name, such as model.layers.0.self_attn.q_proj.weight.
        replaced: weights that were trained whole (`modules_to_save`), by name.
        quantization: of the base in training, as folora-q writes it; None for an adapter trained elsewhere.
    """

    folder: Path
    base: str
    revision: str | None
    deltas: dict[str, Delta]
    replaced: dict[str, Tensor]
    quantization: dict[str, Any] | None


def read_adapter(folder: Path, trust: Trust = NOTHING) -> AdapterFile:
    """Read an adapter in PEFT's format.

    Raises:
        UserError: it is no LoRA adapter, uses something that s B A cannot represent, misses a half of a pair, has a
            rank, a number or a file that cannot be, or something that `trust` does not allow; the tensor is named.
    """
    try:
        config = json.loads((folder / CONFIG).read_text(encoding="utf-8"))
        peft_type = config["peft_type"]
    except (OSError, ValueError, KeyError, TypeError, RecursionError) as error:
        raise UserError(f"{folder} is no adapter: {CONFIG} cannot be read ({error})") from None
    _refuse_unsupported(folder, config, peft_type)
    check_adapter(folder, trust)
    tensors = _read_tensors(folder)
    deltas: dict[str, Delta] = {}
    replaced: dict[str, Tensor] = {}
    for name, tensor in tensors.items():
        if not bool(torch.isfinite(tensor).all()):
            raise UserError(f"{folder / WEIGHTS}: {name} holds numbers that are not finite")
        module, kind, _ = name.removeprefix(PREFIX).partition(".lora_")
        if not kind:
            replaced[name.removeprefix(PREFIX)] = tensor
        elif name.endswith(".lora_A.weight"):
            b = tensors.get(name.replace(".lora_A.", ".lora_B."))
            if b is None:
                raise UserError(f"{folder / WEIGHTS}: {name} has no lora_B beside it")
            deltas[f"{module}.weight"] = _delta(folder, config, module, tensor, b)
        elif not (name.endswith(".lora_B.weight") and name.replace(".lora_B.", ".lora_A.") in tensors):
            raise UserError(f"{folder / WEIGHTS}: {name} is no half of a pair of lora_A.weight and lora_B.weight")
    return AdapterFile(
        folder=folder,
        base=config.get("base_model_name_or_path") or "",
        revision=config.get("revision"),
        deltas=deltas,
        replaced=replaced,
        quantization=(config.get("auto_mapping") or {}).get("quantization_config"),
    )


def _refuse_unsupported(folder: Path, config: dict[str, Any], peft_type: object) -> None:
    if peft_type != "LORA":
        raise UserError(f"{folder} is a {peft_type} adapter; only LoRA can be merged")
    if used := next((name for name in UNSUPPORTED if config.get(name)), None):
        raise UserError(f"{folder} was trained with {used}, which cannot be merged here", "merge it with PEFT itself")
    if config.get("bias", "none") != "none":
        raise UserError(f"{folder} trained biases too, which cannot be merged here", "merge it with PEFT itself")
    start = str(config.get("init_lora_weights", "")).lower()
    if start.startswith(REBASING_STARTS):
        raise UserError(
            f"{folder} started with init_lora_weights={start}, which changes the base's own weights",
            "convert it with PEFT's path_initial_model_for_weight_conversion first",
        )


def _read_tensors(folder: Path) -> dict[str, Tensor]:
    path = folder / WEIGHTS
    if not path.exists() and (folder / PICKLED_ADAPTER).exists():  # it is allowed, or it had been refused
        return unpickled(folder / PICKLED_ADAPTER)
    try:
        with safe_open(path, "pt") as file:
            return {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118  (it is no dict)
    except FileNotFoundError:
        raise UserError(f"there is no {path}") from None
    except (SafetensorError, OSError) as error:
        raise UserError(f"{path} is damaged: {error}") from None


def _delta(folder: Path, config: dict[str, Any], module: str, a: Tensor, b: Tensor) -> Delta:
    def setting(pattern: str, default: str) -> float:
        patterns = config.get(pattern) or {}
        return patterns.get(get_pattern_key(list(patterns), module), config[default])

    rank, alpha = setting("rank_pattern", "r"), setting("alpha_pattern", "lora_alpha")
    if a.ndim != 2 or b.ndim != 2 or a.shape[0] != rank or b.shape[1] != rank:
        raise UserError(
            f"{folder}: A {tuple(a.shape)} and B {tuple(b.shape)} of {module} are not a pair of rank {rank}"
        )
    scale = alpha / (math.sqrt(rank) if config.get("use_rslora") else rank)
    return Delta(a.float(), b.float(), scale, bool(config.get("fan_in_fan_out")))
