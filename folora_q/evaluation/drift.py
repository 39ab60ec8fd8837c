"""Measure how far each layer's output moved from the base's: E‖ΔW x‖² / E‖W x‖².

Measured on the base's own activations x, so that it shows a layer's own change and not that of earlier layers; and
from the gates' statistics, tr(ΔW Σ ΔWᵀ) / tr(W Σ Wᵀ), without any text. The latter predicts the former if Σ weights all
tokens equally; if it weights them by the loss gradient (`gate.covariance: fisher`), it shows the effect on the loss.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from typing import Any, cast

import bitsandbytes as bnb
import torch
from peft import PeftModel
from peft.tuners.lora import LoraLayer
from peft.tuners.tuners_utils import BaseTunerLayer
from peft.utils.integrations import dequantize_module_weight
from torch import Tensor, nn
from transformers.pytorch_utils import Conv1D

from folora_q.core import SpectralGate
from folora_q.data.batch_splitting import BatchSplitter
from folora_q.data.tokens import Batch, count_tokens
from folora_q.evaluation.model_pair import ModelPair
from folora_q.models.adapters import adapter_pairs, factors
from folora_q.models.decoded import decoded_weight
from folora_q.models.sharding import with_weights
from folora_q.runs.results import TextKind


@dataclass(frozen=True)
class LayerChange:
    """One linear layer: the module that computes W x in the base, and ΔW x as a function of x (..., d) -> (..., o)."""

    layer: nn.Module
    delta: Callable[[Tensor, Tensor], Tensor]  # of x and of the layer's output


def layer_changes(model_pair: ModelPair) -> dict[str, LayerChange]:
    """Return every linear layer that an adapter changes, or that two models share, except the head."""
    if model_pair.adapted is not None:
        return {
            name: LayerChange(module.get_base_layer(), _adapter_delta(module))
            for name, module in adapted_layers(model_pair.adapted).items()
        }
    assert model_pair.other is not None, "a pair without an adapter is of two models"
    theirs = dict(model_pair.other.named_modules())
    head = model_pair.model.get_output_embeddings()
    return {
        name: LayerChange(theirs[name], lambda x, out, module=module: module(x).float() - out.float())
        for name, module in model_pair.model.named_modules()
        if _is_linear(module) and module is not head and _is_linear(theirs.get(name))
    }


def measured_drift(
    model_pair: ModelPair,
    text: Iterable[Batch],
    on_progress: Callable[[int], None] = lambda tokens: None,
    splitter: BatchSplitter | None = None,
) -> dict[str, float]:
    """Return E‖ΔW x‖² / E‖W x‖² by layer, over the tokens of a text, with x from the base; 0 if no token reaches it.

    Args:
        on_progress: called with the number of tokens read.
        splitter: splits batches if memory runs out; None raises.
    """
    splitter = splitter or BatchSplitter("measuring drift of", enabled=False)
    changes = layer_changes(model_pair)
    model_pair.eval()
    totals: dict[str, Tensor] = {}
    seen: dict[str, Tensor] = {}  # of the present part
    with torch.no_grad(), model_pair.base() as base, _watching(changes, seen) as mask:

        def look(part: Batch) -> dict[str, Tensor]:
            seen.clear()
            mask[0] = part.attention_mask.bool()
            base(input_ids=part.input_ids, attention_mask=part.attention_mask, use_cache=False, logits_to_keep=1)
            return dict(seen)

        for batch in text:
            for sums in splitter.over_batch(batch, look):
                totals.update({name: totals.get(name, 0) + moved for name, moved in sums.items()})
            on_progress(count_tokens([batch]))
    return {name: _ratio(totals.get(name)) for name in changes}


def predicted_drift(model: PeftModel, gates: Mapping[str, SpectralGate]) -> dict[str, dict[str, float]]:
    """Predict the drift by layer for the texts that the gates were computed from, by kind of text.

    ‖BAx‖² needs BᵀB and AΣAᵀ, both r x r; W is dequantized, one layer at a time.
    """
    found: dict[str, dict[str, float]] = {}
    pairs = {pair.module: pair for pair in adapter_pairs(model) if pair.name in gates}
    for module in with_weights(model, list(pairs)):
        pair = pairs[module]
        gate = gates[pair.name]
        layer = pair.module.get_base_layer()
        four_bit = isinstance(layer, bnb.nn.Linear4bit)
        weight = (decoded_weight(layer) if four_bit else dequantize_module_weight(layer)).float()
        if isinstance(layer, Conv1D):
            weight = weight.T
        gram_b = (pair.b.detach().T @ pair.b.detach()).double().cpu() * pair.scale**2
        penalty, utility = gate.forms(pair.a.detach())
        found[pair.name] = {
            TextKind.GENERATED: float((gram_b * penalty).sum() / gate.penalty(weight)),
            TextKind.TASK: float((gram_b * utility).sum() / gate.utility(weight)),
        }
    return found


def update_norm(module: nn.Module | BaseTunerLayer) -> float | None:
    """Return ‖ΔW‖ of a LoRA layer, from r x r products; None for other kinds of layers."""
    if not isinstance(module, LoraLayer) or not _is_plain(module):
        return None
    total = 0.0
    products = [_factors(module, name) for name in module.active_adapters if name in module.lora_A]
    for b1, a1 in products:  # ‖Σ BᵢAᵢ‖² = Σᵢⱼ tr(BᵢᵀBⱼ AⱼAᵢᵀ)
        for b2, a2 in products:
            total += float(((b1.T @ b2) * (a1 @ a2.T)).sum())
    return max(total, 0.0) ** 0.5


def adapted_layers(model: PeftModel) -> dict[str, BaseTunerLayer]:
    """Return the adapted linear layers by name."""
    return {
        name.removeprefix("base_model.model."): module
        for name, module in model.named_modules()
        if isinstance(module, BaseTunerLayer) and _is_linear(module.get_base_layer())
    }


def _factors(module: LoraLayer, adapter: str) -> tuple[Tensor, Tensor]:
    """Return s B (o, r) and A (r, d) in float64."""
    a, b = factors(module, adapter)
    return b.detach().double() * module.scaling[adapter], a.detach().double()


def _adapter_delta(module: BaseTunerLayer) -> Callable[[Tensor, Tensor], Tensor]:
    if isinstance(module, LoraLayer) and _is_plain(module):

        def product(x: Tensor, _: Tensor) -> Tensor:
            total: Tensor | None = None
            for adapter in module.active_adapters:
                if adapter in module.lora_A:
                    a, b = factors(module, adapter)
                    rows = nn.functional.linear(x.float(), a.float()) * module.scaling[adapter]
                    moved = nn.functional.linear(rows, b.float())
                    total = moved if total is None else total + moved
            return torch.zeros_like(x[..., :1]) if total is None else total

        return product

    def difference(x: Tensor, out: Tensor) -> Tensor:
        """Return the output with the adapter minus that without, in the compute dtype's precision."""
        module.enable_adapters(True)
        try:
            return cast(nn.Module, module).forward(x).float() - out.float()
        finally:
            module.enable_adapters(False)

    return difference


def _is_plain(module: LoraLayer) -> bool:
    """Return whether the layer's change is s B A and nothing else (no DoRA, no bias)."""
    return not getattr(module, "lora_variant", None) and not any(getattr(module, "lora_bias", {}).values())


def _energy(y: Tensor) -> Tensor:
    """Return ‖y‖² over the last dimension, without a copy of y."""
    return torch.linalg.vector_norm(y, dim=-1, dtype=torch.float32).square()


def _ratio(sums: Tensor | None) -> float:
    moved, output = (0.0, 0.0) if sums is None else sums.tolist()
    return moved / output if output else 0.0


def _is_linear(module: nn.Module | None) -> bool:
    return isinstance(module, nn.Linear | Conv1D)


@contextmanager
def _watching(changes: Mapping[str, LayerChange], totals: dict[str, Tensor]) -> Iterator[list[Tensor]]:
    """Add (Σ‖ΔWx‖², Σ‖Wx‖²) of every forward pass to `totals`; yields a list whose only item is the token mask."""
    mask: list[Tensor] = [torch.empty(0)]
    busy: list[str] = []

    def look(name: str, change: LayerChange, _: nn.Module, args: tuple[Any, ...], out: Tensor) -> None:
        if busy:  # the change itself calls the layer
            return
        x = args[0]
        busy.append(name)
        try:
            moved = change.delta(x, out)
        finally:
            busy.clear()
        bias = getattr(change.layer, "bias", None)
        energies = torch.stack([_energy(moved), _energy(out if bias is None else out - bias)])  # (2, ...) by token
        if mask[0].shape == x.shape[:-1]:  # experts receive tokens picked from the batch
            energies = energies * mask[0]
        sums = energies.flatten(1).sum(1, dtype=torch.float64)
        totals[name] = totals[name] + sums if name in totals else sums

    handles = [change.layer.register_forward_hook(partial(look, name, change)) for name, change in changes.items()]
    try:
        yield mask
    finally:
        for handle in handles:
            handle.remove()
