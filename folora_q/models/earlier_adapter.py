"""A base that carries an earlier adapter: W x + s B A x with frozen A and B, below the adapter that is trained.

A 4-bit weight cannot hold W + s B A exactly, so the product stays apart. It is computed inside the base's own layers:
what switches the trained adapter off then has the base with the earlier adapter, which is the model to compare with, to
sample from and to preserve.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any

import torch
from peft import LoraConfig
from safetensors.torch import load_file, save_file
from torch import Tensor, nn
from torch.nn.functional import linear

from folora_q.errors import UserError
from folora_q.models.adapter_file import PREFIX, AdapterFile, read_adapter
from folora_q.models.trust import ADAPTER_CONFIG, NOTHING, SAFE_ADAPTER, Trust
from folora_q.recipe.earlier_adapter import adapter_in
from folora_q.storage.files import atomic_write, commit_directory

Factors = tuple[Tensor, Tensor]


@dataclass(frozen=True)
class EarlierAdapter:
    """The adapter that a base carries.

    Attributes:
        name: what the recipe names, for display.
        base: the model that it says it belongs to; "" if it names none.
        factors: A (r, d) and s B (o, r) of each layer in float32, by the layer's name.
        fingerprint: identifies its numbers.
    """

    name: str
    base: str
    factors: dict[str, Factors]
    fingerprint: str


class CarryingLayer(nn.Linear):
    """A linear layer that computes W x + s B A x; a class is made of it and of the layer's own.

    Attributes:
        carried_a: A, (r, d) float32.
        carried_b: s B, (o, r) float32.
    """

    carried_a: Tensor
    carried_b: Tensor

    def forward(self, x: Tensor) -> Tensor:
        output = super().forward(x)
        rows = linear(x.to(self.carried_a.dtype), self.carried_a)
        return output + linear(rows, self.carried_b).to(output.dtype)


@cache
def _carrying(kind: type[nn.Linear]) -> type[nn.Linear]:
    return type(f"Carrying{kind.__name__}", (CarryingLayer, kind), {})


def read_earlier(name: str, trust: Trust = NOTHING) -> EarlierAdapter:
    """Read the LoRA adapter of a run folder or an adapter folder.

    Raises:
        UserError: it cannot be read, or is not a sum of products s B A of linear layers.
    """
    return _earlier(name, read_adapter(adapter_in(Path(name)), trust))


def _earlier(name: str, adapter: AdapterFile) -> EarlierAdapter:
    if whole := sorted(adapter.replaced.keys() - adapter.deltas.keys()):  # PEFT saves the base's head next to its pair
        raise UserError(
            f"{adapter.folder} trained {', '.join(whole[:2])} in full, which cannot be stacked on",
            f"merge it (folora-q merge {adapter.folder}) and name the merged model",
        )
    digest, factors = hashlib.sha256(), {}
    for weight, delta in sorted(adapter.deltas.items()):
        a, b = delta.a.contiguous(), (delta.b * delta.scale).contiguous()
        factors[weight.removesuffix(".weight")] = a, b
        digest.update(f"{weight} {tuple(a.shape)} {tuple(b.shape)}".encode())
        digest.update(a.numpy().tobytes())
        digest.update(b.numpy().tobytes())
    return EarlierAdapter(name, adapter.base, factors, digest.hexdigest())


def carry(model: nn.Module, earlier: EarlierAdapter, head: nn.Module | None = None) -> None:
    """Let the layers of a loaded base compute with an earlier adapter.

    Args:
        head: the output layer, which is used in other ways than by calling it.

    Raises:
        UserError: it belongs to another model, or changes an embedding or the output layer.
    """
    modules = dict(model.named_modules())
    for name, (a, b) in earlier.factors.items():
        layer = modules.get(name)
        if layer is None:
            raise UserError(f"{earlier.name} adapts {name}, which this base does not have", "is it of another model?")
        if not isinstance(layer, nn.Linear) or layer is head:
            raise UserError(
                f"{earlier.name} adapts {name}, an embedding or the output layer, which cannot be stacked on",
                f"merge it (folora-q merge {earlier.name}) and name the merged model",
            )
        if (layer.in_features, layer.out_features) != (a.shape[1], b.shape[0]):
            raise UserError(
                f"{earlier.name} adapts {name} as a layer of {a.shape[1]} x {b.shape[0]}, and this base has "
                f"{layer.in_features} x {layer.out_features}",
                "is it of another model?",
            )
    for name, (a, b) in earlier.factors.items():
        layer: Any = modules[name]
        device = layer.weight.device
        layer.register_buffer("carried_a", a.to(device), persistent=False)
        layer.register_buffer("carried_b", b.to(device), persistent=False)
        layer.__class__ = _carrying(type(layer))


def save_earlier(earlier: EarlierAdapter, folder: Path, named: Mapping[str, Any]) -> None:
    """Save it in PEFT's format and in float32: read again, it has the same fingerprint.

    Args:
        named: values of adapter_config.json that name the base.
    """
    with commit_directory(folder) as staging:
        _write(staging, dict(earlier.factors), {}, {**LoraConfig(task_type="CAUSAL_LM").to_dict(), **named})


def stack(earlier: EarlierAdapter, added: Path, folder: Path, dtype: torch.dtype) -> None:
    """Write the sum of the earlier adapter and the one trained on it as one adapter of the original base.

    ΔW = s₁B₁A₁ + s₂B₂A₂ = [s₁B₁ s₂B₂] [A₁; A₂], of rank r₁ + r₂ and scale 1: PEFT's `add_weighted_adapter` with
    combination_type "cat" makes the same product.

    Args:
        added: folder of the trained adapter; files and settings are taken from it.
        dtype: of the file.
    """
    mine = {name.removesuffix(".weight"): delta for name, delta in read_adapter(added).deltas.items()}
    factors = {name: (delta.a, delta.b * delta.scale) for name, delta in mine.items()}
    for name, (a, b) in earlier.factors.items():
        if name in factors:
            a, b = torch.cat([a, factors[name][0]]), torch.cat([b, factors[name][1]], 1)
        factors[name] = a, b
    others = {name: tensor for name, tensor in load_file(added / SAFE_ADAPTER).items() if ".lora_" not in name}
    config = json.loads((added / ADAPTER_CONFIG).read_text(encoding="utf-8"))
    same_layers = mine.keys() == earlier.factors.keys()
    kept = {key: config[key] for key in ("target_modules", "exclude_modules") if same_layers}
    _write(folder, {name: (a.to(dtype), b.to(dtype)) for name, (a, b) in factors.items()}, others, config, kept)


def _write(
    folder: Path,
    factors: Mapping[str, Factors],
    others: Mapping[str, Tensor],
    config: Mapping[str, Any],
    targets: Mapping[str, Any] | None = None,
) -> None:
    """Write an adapter of scale 1 whose layers may differ in rank.

    Args:
        others: weights that are no LoRA pairs.
        targets: how adapter_config.json names the layers; by default one by one.
    """
    tensors = dict(others)
    for name, (a, b) in factors.items():
        tensors[f"{PREFIX}{name}.lora_A.weight"] = a.contiguous()
        tensors[f"{PREFIX}{name}.lora_B.weight"] = b.contiguous()
    save_file(tensors, folder / SAFE_ADAPTER, metadata={"format": "pt"})
    ranks = {name: len(a) for name, (a, _) in factors.items()}
    usual = max(ranks.values(), key=list(ranks.values()).count)
    unusual = {name: rank for name, rank in sorted(ranks.items()) if rank != usual}
    written = {
        **config,
        **(targets or {"target_modules": sorted(factors), "exclude_modules": None}),
        "r": usual,
        "lora_alpha": usual,
        "rank_pattern": unusual,
        "alpha_pattern": unusual,
        "use_rslora": False,
        "inference_mode": True,
    }
    text = json.dumps(written, indent=2, sort_keys=True, default=_plain)
    atomic_write(folder / ADAPTER_CONFIG, text + "\n")


def _plain(value: object) -> Any:
    """Return a value of a LoraConfig as JSON has it: enumerations by value, sets as sorted lists."""
    return sorted(value) if isinstance(value, set) else getattr(value, "value", str(value))
