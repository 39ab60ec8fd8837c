"""Exact covariances of what layers read, and what can be done to them before a gate is made of them."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from peft import PeftModel
from torch import Tensor

from folora_q.core import ProjectedCovariance
from folora_q.data.tokens import Batch
from folora_q.models.adapters import adapter_pairs
from folora_q.statistics.collect import Reading
from folora_q.statistics.hooks import shared_inputs

# A channel whose variance is so many times the median is massive: it alone would say how large a variance is.
MASSIVE = 100.0


@dataclass(frozen=True)
class Covariance:
    """Σ (d, d) float64, and the mean variance by which it is to be divided."""

    matrix: Tensor
    unit: float

    @classmethod
    def of(cls, matrix: Tensor) -> Covariance:
        return cls(matrix, float(matrix.diagonal().mean()))

    @property
    def normalized(self) -> Tensor:
        return self.matrix / self.unit


@dataclass(frozen=True)
class Positions:
    """One layer's Σ over all tokens of a text but each sequence's first, over the first, and their share of all."""

    later: Tensor
    first: Tensor
    share: float

    @property
    def every(self) -> Tensor:
        """Σ over all tokens; not kept, since a model's exact covariances take gigabytes."""
        return torch.lerp(self.later, self.first, self.share)


def measure(model: PeftModel, text: Sequence[Batch], weighted: bool) -> dict[str, Positions]:
    """Of every adapted layer's input, with the adapter off; layers that read one tensor share an object.

    Args:
        weighted: tokens count by the loss's gradient, as for the recipe's `gate.covariance: fisher`.
    """
    modules = {pair.name: pair.module for pair in adapter_pairs(model)}
    model.eval()
    with model.disable_adapter():
        groups = shared_inputs(model, modules, text[0].input_ids[:1, :8])
        reading = Reading(model, modules, groups, weighted)
        sums, counts = [], []
        for first in (False, True):
            sinks = {
                g[0]: ProjectedCovariance(torch.eye(modules[g[0]].in_features), device=model.device) for g in groups
            }
            reading.feed(text, sinks, _first if first else _later)
            sums.append({name: sink.gram.double().cpu() for name, sink in sinks.items()})
            counts.append({name: sink.count for name, sink in sinks.items()})
    found = {}
    for group in groups:
        (later, first), (n, m) = (sum_[group[0]] for sum_ in sums), (count[group[0]] for count in counts)
        positions = Positions(later / n, first / max(m, 1), m / (n + m))
        found |= dict.fromkeys(group, positions)
    return found


def _later(counted: Tensor) -> Tensor:
    return torch.cat([torch.zeros_like(counted[:, :1]), counted[:, 1:]], 1)


def _first(counted: Tensor) -> Tensor:
    return torch.cat([counted[:, :1], torch.zeros_like(counted[:, 1:])], 1)


Pair = tuple[Covariance, Covariance]


def plain(penalty: Positions, utility: Positions) -> Pair:
    """As the product has them."""
    return Covariance.of(penalty.every), Covariance.of(utility.every)


def first_dropped(penalty: Positions, utility: Positions) -> Pair:
    """No text's first position counts: a massive activation stands there."""
    return Covariance.of(penalty.later), Covariance.of(utility.later)


def first_protected(penalty: Positions, utility: Positions) -> Pair:
    """As before, but the leading direction of first positions costs as much as a direction can."""
    dropped, useful = first_dropped(penalty, utility)
    leading = torch.linalg.eigh(penalty.first).eigenvectors[:, -1:]
    return Covariance(dropped.matrix + len(leading) * dropped.unit * leading @ leading.T, dropped.unit), useful


def robust(penalty: Positions, utility: Positions) -> Pair:
    """Each divided by the mean variance of the channels that are not massive."""

    def even(covariance: Tensor) -> Covariance:
        variances = covariance.diagonal()
        return Covariance(covariance, float(variances[variances <= MASSIVE * variances.median()].mean()))

    return even(penalty.every), even(utility.every)


def shrunk(penalty: Positions, utility: Positions) -> Pair:
    """A tenth of each replaced by its mean variance, evenly in all directions."""

    def even(covariance: Covariance) -> Covariance:
        identity = torch.eye(len(covariance.matrix), dtype=torch.float64)
        return Covariance(0.9 * covariance.matrix + 0.1 * covariance.unit * identity, covariance.unit)

    first, second = plain(penalty, utility)
    return even(first), even(second)


TREATMENTS: dict[str, Callable[[Positions, Positions], Pair]] = {
    treatment.__name__: treatment for treatment in (plain, first_dropped, first_protected, robust, shrunk)
}
