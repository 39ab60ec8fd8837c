"""Exact covariances of layers' inputs, from which other methods are computed.

A 7B model's take tens of gigabytes. So they are summed a few layers at a time, held on the host in float32, as they
were summed, and made into float64 matrices for one layer at a time.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence

import torch
from peft import PeftModel
from torch import Tensor

from folora_q.calibration.collect import BYTES, Reading, partition_by_memory
from folora_q.calibration.hooks import shared_inputs
from folora_q.core import ProjectedCovariance
from folora_q.data.tokens import Batch
from folora_q.models.adapters import adapter_off, adapter_pairs

# Summed on the model's device at a time, in bytes: the demo's model at once, a 7B model in a dozen readings.
AT_ONCE = 4 * 2**30


class Covariances(Mapping[str, tuple[Tensor, Tensor]]):
    """(Σp, Σt) of each layer, (d, d) float64, each divided by its mean variance; computed when asked for.

    The last pair is held, so that layers which read the same tensor get the same object if they are asked for in turn.
    """

    def __init__(self, penalty: Mapping[str, Tensor], utility: Mapping[str, Tensor]) -> None:
        self._sides = (penalty, utility)
        self._last: tuple[Tensor, Tensor, tuple[Tensor, Tensor]] | None = None

    def __getitem__(self, layer: str) -> tuple[Tensor, Tensor]:
        penalty, utility = (side[layer] for side in self._sides)
        if self._last is None or self._last[0] is not penalty or self._last[1] is not utility:
            self._last = None  # it is freed before the next is made
            self._last = (penalty, utility, (_normalized(penalty), _normalized(utility)))
        return self._last[2]

    def __iter__(self) -> Iterator[str]:
        return iter(self._sides[0])

    def __len__(self) -> int:
        return len(self._sides[0])


def _normalized(matrix: Tensor) -> Tensor:
    matrix = matrix.double()
    return matrix / matrix.diagonal().mean()


def measure(model: PeftModel, text: Sequence[Batch], at_once: float = AT_ONCE) -> dict[str, Tensor]:
    """Σ x xᵀ of every adapted layer's input, (d, d) float32, with the adapter off.

    Layers that read the same tensor share one. Every token from which a label is predicted counts alike.

    Args:
        at_once: bytes; the text is read again for layers that do not fit.
    """
    modules = {pair.name: pair.module for pair in adapter_pairs(model)}
    model.eval()
    with adapter_off(model):
        groups = shared_inputs(model, modules, text[0].input_ids[:1, :8])
        reading = Reading(model, modules, groups, weighted=False)
        found: dict[str, Tensor] = {}
        # Each has a basis and a sum, (d, d).
        needed = {group[0]: 2 * BYTES * modules[group[0]].in_features ** 2 for group in groups}
        for share in partition_by_memory(needed, at_once):
            widths = {name: modules[name].in_features for name in share}
            sinks = {name: ProjectedCovariance(torch.eye(d), device=model.device) for name, d in widths.items()}
            reading.feed(text, sinks)
            found |= {name: sink.gram.cpu() for name, sink in sinks.items()}
    by_layer = {name: found[group[0]] for group in groups for name in group}
    return {name: by_layer[name] for name in modules}
