"""Compare the base and the tuned model on the same text: losses, and the KL divergence of their predictions."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from folora_q.data.batch_splitting import BatchSplitter, divided
from folora_q.data.tokens import Batch, count_tokens
from folora_q.evaluation.intervals import Tally, change, estimate
from folora_q.evaluation.model_pair import ModelPair
from folora_q.models.logits import chunks, hidden_states, verify_chunked_logits
from folora_q.runs.results import TextKind, TextResult


@dataclass(frozen=True)
class HeldOutText:
    """Text for evaluation only: neither trained on nor used for statistics.

    Attributes:
        batches: tokens with a label are the predictions that count.
    """

    name: str
    kind: TextKind
    batches: Sequence[Batch]


def compare(
    model_pair: ModelPair,
    text: HeldOutText,
    on_progress: Callable[[int], None] = lambda tokens: None,
    splitter: BatchSplitter | None = None,
) -> TextResult:
    """Return losses of both models, KL(base ‖ tuned) and top-1 agreement, as means over the text's labelled tokens.

    On text that the base model sampled, the mean KL is an unbiased estimate of the divergence over all its text.
    Memory holds the hidden states of one batch, and the logits of both models at a few positions.

    Args:
        on_progress: called with the number of tokens read.
        splitter: splits batches if memory runs out; None raises.
    """
    all_sums, all_counts = sums_by_row(model_pair, text.batches, on_progress, splitter)
    said = all_counts > 0  # a row may have no tokens that count
    counts = all_counts[said].numpy()
    base_loss, tuned_loss, kl, agreed = (Tally(row, counts) for row in all_sums[:, said].numpy())
    return TextResult(
        name=text.name,
        kind=text.kind,
        texts=len(counts),
        tokens=int(counts.sum()),
        loss=change(base_loss, tuned_loss),
        kl=estimate(kl, limits=(0.0, math.inf)),
        top1_agreement=estimate(agreed, limits=(0.0, 1.0)),
    )


def sums_by_row(
    model_pair: ModelPair,
    text: Sequence[Batch],
    on_progress: Callable[[int], None] = lambda tokens: None,
    splitter: BatchSplitter | None = None,
) -> tuple[Tensor, Tensor]:
    """Compare both models on a text, and return sums over the labelled tokens of each row, in the order of its rows.

    Args:
        on_progress, splitter: as in `compare`.

    Returns:
        Sums (4, rows) of the losses of base and tuned model, KL and agreement, and numbers of tokens (rows,).
    """
    splitter = splitter or BatchSplitter("comparing", enabled=False)
    processes = model_pair.processes
    parts: list[tuple[int, list[tuple[Tensor, Tensor]]]] = []
    model_pair.eval()
    with torch.no_grad():
        for number, batch in enumerate(divided(text, processes.count)):
            on_progress(count_tokens([batch]))
            if not processes.owns(number):
                continue
            if number < processes.count:
                with model_pair.base() as base:
                    verify_chunked_logits(base, batch.input_ids)
            parts.append((number, list(splitter.over_batch(batch, lambda part: _tally(model_pair, part)))))
    gathered = sorted((part for mine in processes.gather(parts) for part in mine), key=lambda part: part[0])
    tallies = [tally for _, part in gathered for tally in part]  # in the order of the text's rows
    sums, counts = (torch.cat(tensors, -1) for tensors in zip(*tallies, strict=True))
    return sums, counts


def _tally(model_pair: ModelPair, batch: Batch) -> tuple[Tensor, Tensor]:
    """Return sums over each text's tokens, (4, b): losses of base and tuned, KL, agreement; and token counts, (b,)."""
    counted = batch.loss_positions
    of_base = model_pair.base_states(batch)
    with model_pair.tuned() as tuned:
        of_tuned = hidden_states(tuned, batch.input_ids, batch.attention_mask)[counted]
    wanted, owners = batch.targets, counted.nonzero()[:, 0].cpu()
    sums = torch.zeros(4, len(counted), dtype=torch.float64)
    for part in chunks(len(wanted)):
        log_p, log_q = model_pair.log_probabilities(of_base[part], of_tuned[part])
        sums.index_add_(1, owners[part], _at_tokens(log_p, log_q, wanted[part]).double().cpu())
    return sums, counted.sum(1).double().cpu()


def _at_tokens(log_p: Tensor, log_q: Tensor, wanted: Tensor) -> Tensor:
    """Return (4, n): losses of base and tuned, KL(p ‖ q) and agreement at n positions, from (n, vocabulary)."""
    losses = [-log.gather(-1, wanted[:, None])[:, 0] for log in (log_p, log_q)]
    kl = (log_p.exp() * (log_p - log_q)).sum(-1)
    return torch.stack([*losses, kl, (log_p.argmax(-1) == log_q.argmax(-1)).to(kl)])
