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
from folora_q.statistics.hooks import feeding, shared_inputs

# A channel whose variance is so many times the median is massive: it alone would say how large a variance is.
MASSIVE = 100.0


@dataclass(frozen=True)
class Moments:
    """E[x xᵀ] over a text's tokens that count, (d, d) float64, and over first tokens among them, `share` of all."""

    mean: Tensor
    first: Tensor
    share: float

    @property
    def without_first(self) -> Tensor:
        return (self.mean - self.share * self.first) / (1 - self.share)


def moments(model: PeftModel, text: Sequence[Batch]) -> dict[str, Moments]:
    """Of every adapted layer's input, with the adapter off; layers that read one tensor share an object."""
    modules = {pair.name: pair.module for pair in adapter_pairs(model)}
    model.eval()
    with torch.no_grad(), model.disable_adapter():
        groups = shared_inputs(model, modules, text[0].input_ids[:1, :8])
        readers = {group[0]: modules[group[0]] for group in groups}
        # A first token sees itself alone, so texts of one token have the activations of first positions.
        everywhere, first = (_sums(model, readers, text, length) for length in (None, 1))
    counts = [sum(int(batch.predicting[:, :length].sum()) for batch in text) for length in (None, 1)]
    share = counts[1] / counts[0]
    found = {name: Moments(everywhere[name] / counts[0], first[name] / max(counts[1], 1), share) for name in readers}
    return {name: found[group[0]] for group in groups for name in group}


def _sums(model: PeftModel, readers: dict, text: Sequence[Batch], length: int | None) -> dict[str, Tensor]:
    device = model.device
    sinks = {name: ProjectedCovariance(torch.eye(m.in_features), device=device) for name, m in readers.items()}
    with feeding(readers, sinks) as mask:
        for batch in text:
            ids, seen, mask[0] = (x[:, :length] for x in (batch.input_ids, batch.attention_mask, batch.predicting))
            model(input_ids=ids, attention_mask=seen, use_cache=False, logits_to_keep=1)
    return {name: sink.gram.double().cpu() for name, sink in sinks.items()}


def plain(penalty: Moments, utility: Moments) -> tuple[Tensor, Tensor]:
    """Each divided by its own mean variance, as the product does."""
    return _even(penalty.mean), _even(utility.mean)


def first_dropped(penalty: Moments, utility: Moments) -> tuple[Tensor, Tensor]:
    """No text's first position counts: a massive activation stands there."""
    return _even(penalty.without_first), _even(utility.without_first)


def first_protected(penalty: Moments, utility: Moments) -> tuple[Tensor, Tensor]:
    """As before, but the leading direction of first positions costs as much as a direction can."""
    dropped, useful = first_dropped(penalty, utility)
    leading = torch.linalg.eigh(penalty.first).eigenvectors[:, -1:]
    return dropped + len(dropped) * leading @ leading.T, useful


def robust(penalty: Moments, utility: Moments) -> tuple[Tensor, Tensor]:
    """Each divided by the mean variance of the channels that are not massive."""

    def even(covariance: Tensor) -> Tensor:
        variances = covariance.diagonal()
        return covariance / variances[variances <= MASSIVE * variances.median()].mean()

    return even(penalty.mean), even(utility.mean)


def shrunk(penalty: Moments, utility: Moments) -> tuple[Tensor, Tensor]:
    """A tenth of each replaced by its mean variance, evenly in all directions."""
    return tuple(0.9 * found + 0.1 * torch.eye(len(found), dtype=found.dtype) for found in plain(penalty, utility))


def _even(covariance: Tensor) -> Tensor:
    return covariance / covariance.diagonal().mean()


Treatment = Callable[[Moments, Moments], tuple[Tensor, Tensor]]
TREATMENTS: dict[str, Treatment] = {
    treatment.__name__: treatment for treatment in (plain, first_dropped, first_protected, robust, shrunk)
}
