"""Measure DPO's loss on held-out pairs, and how often and by how much the chosen answer is preferred."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor
from torch.nn.functional import logsigmoid

from folora_q.data.batch_splitting import BatchSplitter
from folora_q.data.pairs import Ids, in_order
from folora_q.data.tokens import Batch, batches
from folora_q.evaluation.divergence import sums_by_row
from folora_q.evaluation.intervals import Tally, change, estimate, share
from folora_q.evaluation.model_pair import ModelPair
from folora_q.runs.results import PreferenceResult


@dataclass(frozen=True)
class HeldOutPairs:
    """Pairs for evaluation only.

    Attributes:
        batches: each row with a chosen answer is followed by that with the rejected one, perhaps in the next batch.
        beta: of DPO's loss.
    """

    batches: Sequence[Batch]
    beta: float


def heldout_pairs(ids: Ids, labels: Ids, beta: float, batch_size: int, device: torch.device) -> HeldOutPairs:
    """Prepare pairs for measuring.

    Args:
        ids, labels: from `folora_q.data.pairs.both_answers`.
        batch_size: sequences per batch.
    """
    ids, labels = in_order(ids, labels)
    return HeldOutPairs(list(batches(ids, batch_size, device, labels, sort=False)), beta)


def dpo_losses(rewards: Tensor) -> Tensor:
    """Return the losses (pairs,) of implicit rewards (pairs, 2), that of the chosen answer first.

    Source: Rafailov et al., Direct Preference Optimization, arXiv 2305.18290, equation 7.
    """
    return -logsigmoid(rewards[:, 0] - rewards[:, 1])


def measure_pairs(
    model_pair: ModelPair,
    pairs: HeldOutPairs,
    on_progress: Callable[[int], None] = lambda tokens: None,
    splitter: BatchSplitter | None = None,
) -> PreferenceResult:
    """Measure the loss, and accuracy and margin of the implicit reward; all processes of the pair take part.

    Args:
        on_progress: called with the number of tokens read.
        splitter: splits batches if memory runs out; None raises.
    """
    sums, _ = sums_by_row(model_pair, pairs.batches, on_progress, splitter)
    of_base, of_tuned = sums[0], sums[1]
    rewards = pairs.beta * (of_base - of_tuned).view(-1, 2)  # of losses, so the signs are turned
    margins = (rewards[:, 0] - rewards[:, 1]).numpy()
    ones = np.ones(len(margins))
    untuned = dpo_losses(torch.zeros_like(rewards)).numpy()
    return PreferenceResult(
        pairs=len(margins),
        beta=pairs.beta,
        loss=change(Tally(untuned, ones), Tally(dpo_losses(rewards).numpy(), ones)),
        accuracy=share(margins > 0),
        margin=estimate(Tally(margins, ones)),
    )
