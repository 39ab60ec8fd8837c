"""Measure implicit rewards of held-out answers: the loss of DPO or KTO, and how well they follow the preferences."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor
from torch.nn.functional import logsigmoid, sigmoid

from folora_q.data.batch_splitting import BatchSplitter
from folora_q.data.pairs import DESIRABLE, in_order, longest_first, sequences_of
from folora_q.data.tokens import Batch, batches
from folora_q.evaluation.divergence import sums_by_row
from folora_q.evaluation.intervals import Tally, change, difference, estimate, share
from folora_q.evaluation.model_pair import ModelPair
from folora_q.recipe.training import TrainingSection
from folora_q.runs.results import Interval, PreferenceResult


@dataclass(frozen=True)
class HeldOutAnswers:
    """Rows of two sequences for evaluation only: pairs, or answers with a label and mismatched ones.

    Attributes:
        batches: the second sequence of a row follows the first, perhaps in the next batch.
        training: names the objective, β and weights.
        desirable: of answers with a label, (rows,) bool.
    """

    batches: Sequence[Batch]
    training: TrainingSection
    desirable: Tensor | None = None


def held_out_answers(
    rows: Mapping[str, Any], training: TrainingSection, batch_size: int, device: torch.device
) -> HeldOutAnswers:
    """Prepare rows for measuring.

    Args:
        rows: tokenized pairs or labelled answers, by column.
        batch_size: sequences per batch.
    """
    ids, labels = sequences_of(rows)
    desirable = torch.tensor([rows[DESIRABLE][row] for row in longest_first(ids)]) if DESIRABLE in rows else None
    ids, labels = in_order(ids, labels)
    return HeldOutAnswers(list(batches(ids, batch_size, device, labels, sort=False)), training, desirable)


def dpo_losses(rewards: Tensor) -> Tensor:
    """Return the losses (pairs,) of implicit rewards (pairs, 2), that of the chosen answer first.

    Source: Rafailov et al., Direct Preference Optimization, arXiv 2305.18290, equation 7.
    """
    return -logsigmoid(rewards[:, 0] - rewards[:, 1])


def kto_losses(rewards: Tensor, reference: Tensor, desirable: Tensor, training: TrainingSection) -> Tensor:
    """Return the losses (rows,) of implicit rewards (rows,): w (1 - σ(r - z)) if desirable, else w (1 - σ(z - r)).

    Source: Ethayarajh et al., KTO: Model Alignment as Prospect Theoretic Optimization, arXiv 2402.01306, equation 7;
    without the constant that it adds, as in TRL.

    Args:
        reference: z, from `kto_reference`; a scalar, or (rows,).
        desirable: (rows,) bool.
        training: has the weights w.
    """
    weights = training.undesirable_weight + (training.desirable_weight - training.undesirable_weight) * desirable
    return weights * sigmoid((reference - rewards) * _signs(desirable))


def kto_reference(rewards: Tensor) -> Tensor:
    """Return z, the mean implicit reward of mismatched answers (rows,), or 0 if it is negative: it estimates β KL."""
    return rewards.mean().clamp(min=0)


def measure_rewards(
    model_pair: ModelPair,
    answers: HeldOutAnswers,
    on_progress: Callable[[int], None] = lambda tokens: None,
    splitter: BatchSplitter | None = None,
) -> PreferenceResult:
    """Measure the loss, and accuracy and margin of the implicit reward; all processes of the pair take part.

    Args:
        on_progress: called with the number of tokens read.
        splitter: splits batches if memory runs out; None raises.
    """
    training = answers.training
    sums, _ = sums_by_row(model_pair, answers.batches, on_progress, splitter)
    of_base, of_tuned = sums[0], sums[1]
    rewards = training.beta * (of_base - of_tuned).view(-1, 2)  # of losses, so the signs are turned
    if answers.desirable is None:
        untuned, judged = dpo_losses(torch.zeros_like(rewards)), _of_pairs(rewards)
    else:
        untuned = _of_labelled(torch.zeros_like(rewards), answers.desirable, training).losses
        judged = _of_labelled(rewards, answers.desirable, training)
    return PreferenceResult(
        pairs=len(rewards),
        beta=training.beta,
        loss=change(_tally(untuned), _tally(judged.losses)),
        accuracy=share(judged.hits.numpy()),
        margin=judged.margin,
        objective="dpo" if answers.desirable is None else "kto",
        reference=judged.reference,
    )


class _Judged(NamedTuple):
    """Losses and hits (rows,), and the other numbers of PreferenceResult."""

    losses: Tensor
    hits: Tensor
    margin: Interval | None
    reference: float | None


def _of_pairs(rewards: Tensor) -> _Judged:
    margins = rewards[:, 0] - rewards[:, 1]
    return _Judged(dpo_losses(rewards), margins > 0, estimate(_tally(margins)), None)


def _of_labelled(rewards: Tensor, desirable: Tensor, training: TrainingSection) -> _Judged:
    """Judge the rewards (rows, 2) of answers and of mismatched ones."""
    own, reference = rewards[:, 0], kto_reference(rewards[:, 1])
    good, bad = own[desirable], own[~desirable]
    margin = difference(_tally(good), _tally(bad)) if len(good) and len(bad) else None
    hits = (own - reference) * _signs(desirable) > 0
    return _Judged(kto_losses(own, reference, desirable, training), hits, margin, float(reference))


def _signs(desirable: Tensor) -> Tensor:
    return torch.where(desirable, 1, -1)


def _tally(values: Tensor) -> Tally:
    return Tally(values.double().numpy(), np.ones(len(values)))
