"""Exact covariances of what layers read, and what can be done to them before a gate is made of them.

A 7B model's take tens of gigabytes. So they are summed a few layers at a time, held on the host in float32, as they
were summed, and made into float64 matrices for one layer at a time.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Generic, TypeVar

import torch
from peft import PeftModel
from torch import Tensor

from folora_q.core import ProjectedCovariance
from folora_q.data.tokens import Batch
from folora_q.models.adapters import adapter_off, adapter_pairs
from folora_q.statistics.collect import BYTES, Reading, in_rounds
from folora_q.statistics.hooks import shared_inputs

# A channel whose variance is so many times the median is massive: it alone would say how large a variance is.
MASSIVE = 100.0
# So much is summed on the model's device at a time, in bytes: the demo's model at once, a 7B model in a dozen readings.
AT_ONCE = 4 * 2**30
T = TypeVar("T")


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
    """Σ x xᵀ (d, d) of a layer's n later tokens of a text, and of the m that begin a sequence."""

    later_sum: Tensor
    first_sum: Tensor
    n: int
    m: int

    @property
    def later(self) -> Tensor:
        """Σ over all tokens but the first ones, float64."""
        return self.later_sum.double() / self.n

    @property
    def first(self) -> Tensor:
        """Σ over the first ones."""
        return self.first_sum.double() / max(self.m, 1)

    @property
    def every(self) -> Tensor:
        """Σ over all tokens."""
        return torch.lerp(self.later, self.first, self.m / (self.n + self.m))


class Made(Mapping[str, T], Generic[T]):
    """What is made of each layer's two texts, when it is asked for.

    The last thing made is held, so that layers which read one tensor get one object if they are asked for in turn.
    """

    def __init__(
        self,
        penalty: Mapping[str, Positions],
        utility: Mapping[str, Positions],
        make: Callable[[Positions, Positions], T],
    ) -> None:
        self._read, self._make = (penalty, utility), make
        self._last: tuple[Positions, Positions, T] | None = None

    def __getitem__(self, layer: str) -> T:
        penalty, utility = (side[layer] for side in self._read)
        if self._last is None or self._last[0] is not penalty or self._last[1] is not utility:
            self._last = None  # it is gone before the next is made
            self._last = (penalty, utility, self._make(penalty, utility))
        return self._last[2]

    def __iter__(self) -> Iterator[str]:
        return iter(self._read[0])

    def __len__(self) -> int:
        return len(self._read[0])


def measure(model: PeftModel, text: Sequence[Batch], weighted: bool, at_once: float = AT_ONCE) -> dict[str, Positions]:
    """Of every adapted layer's input, with the adapter off; layers that read one tensor share an object.

    Args:
        weighted: tokens count by the loss's gradient, as for the recipe's `gate.covariance: fisher`.
        at_once: bytes; the text is read again for layers that do not fit.
    """
    modules = {pair.name: pair.module for pair in adapter_pairs(model)}
    model.eval()
    with adapter_off(model):
        groups = shared_inputs(model, modules, text[0].input_ids[:1, :8])
        reading = Reading(model, modules, groups, weighted)
        found: dict[str, Positions] = {}
        # Each has a basis and a sum, (d, d).
        needed = {group[0]: 2 * BYTES * modules[group[0]].in_features ** 2 for group in groups}
        for share in in_rounds(needed, at_once):
            sums = []
            for counts in (_later, _first):
                sinks = {
                    name: ProjectedCovariance(torch.eye(modules[name].in_features), device=model.device)
                    for name in share
                }
                reading.feed(text, sinks, counts)
                sums.append({name: (sink.gram.cpu(), sink.count) for name, sink in sinks.items()})
            later, first = sums
            found |= {name: Positions(later[name][0], first[name][0], later[name][1], first[name][1]) for name in share}
    by_layer = {name: found[group[0]] for group in groups for name in group}
    return {name: by_layer[name] for name in modules}


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
