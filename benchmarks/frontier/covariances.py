"""Compute the exact covariances of layers' inputs, which several methods need.

Those of a 7B model require tens of gigabytes. They are summed for a few layers at a time, kept on the host in float32,
and converted to float64 for one layer at a time.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from typing import cast

import torch
from peft import PeftModel
from torch import Tensor, nn

from folora_q.calibration.collect import BYTES, partition_by_memory
from folora_q.calibration.hooks import shared_inputs
from folora_q.calibration.reading import Reading
from folora_q.core import ProjectedCovariance
from folora_q.data.tokens import Batch
from folora_q.models.adapters import adapter_off, adapter_pairs

# Bytes of sums on the model's device at a time: one reading for the demo's model, a dozen for a 7B model.
AT_ONCE = 4 * 2**30


class Covariances(Mapping[str, tuple[Tensor, Tensor]]):
    """(Σp, Σt) of each layer, (d, d) float64, each divided by its mean variance; computed on access.

    The last pair is cached, so that consecutive layers that read the same tensor get the same object.
    """

    def __init__(self, penalty: Mapping[str, Tensor], utility: Mapping[str, Tensor]) -> None:
        self._sides = (penalty, utility)
        self._last: tuple[Tensor, Tensor, tuple[Tensor, Tensor]] | None = None

    def __getitem__(self, layer: str) -> tuple[Tensor, Tensor]:
        penalty, utility = (side[layer] for side in self._sides)
        if self._last is None or self._last[0] is not penalty or self._last[1] is not utility:
            self._last = None  # free it before the next is computed
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
    """Return Σ x xᵀ of every adapted layer's input, (d, d) float32, with the adapter off.

    Layers that read the same tensor share a matrix. All tokens from which a label is predicted have the same weight.

    Args:
        at_once: the bytes of sums at a time; the text is read again for layers that do not fit.
    """
    modules = {pair.name: cast(nn.Module, pair.module) for pair in adapter_pairs(model)}
    widths = {name: cast(int, module.in_features) for name, module in modules.items()}
    model.eval()
    with adapter_off(model):
        groups = shared_inputs(model, modules, text[0].input_ids[:1, :8])
        reading = Reading(model, modules, groups, weighted=False)
        found: dict[str, Tensor] = {}
        # For each a basis and a sum, (d, d).
        needed = {group[0]: 2 * BYTES * widths[group[0]] ** 2 for group in groups}
        for share in partition_by_memory(needed, at_once):
            sinks = {name: ProjectedCovariance(torch.eye(widths[name]), device=model.device) for name in share}
            reading.feed(text, sinks)
            found |= {name: sink.gram.cpu() for name, sink in sinks.items()}
    by_layer = {name: found[group[0]] for group in groups for name in group}
    return {name: by_layer[name] for name in modules}
