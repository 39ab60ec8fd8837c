"""Measure the mean loss per token, on the task's held-out completions and on general text."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from pathlib import Path

import torch
from torch.nn.functional import cross_entropy
from transformers import PreTrainedModel
from transformers import PreTrainedTokenizerBase as Tokenizer

from folora_q.data.batch_splitting import BatchSplitter, divided
from folora_q.data.tokens import Batch, text_ids
from folora_q.distributed.processes import ONE, Processes
from folora_q.errors import UserError
from folora_q.models.logits import chunks, head_logits, hidden_states, verify_chunked_logits

# Three kinds of text that no run trains on, by their names in tables. Training may improve one kind and harm others:
# after training on Shakespeare, prose got better and code worse.
GENERAL_TEXTS = {name: Path(__file__).parent / "general" / f"{name}.txt" for name in ("prose", "manual", "code")}


def mean_loss(
    model: PreTrainedModel,
    text: Iterable[Batch],
    on_progress: Callable[[int], None] = lambda batches: None,
    splitter: BatchSplitter | None = None,
    processes: Processes = ONE,
) -> float:
    """Return the cross-entropy in nats, averaged over all labelled tokens (not over batches).

    Args:
        model: the causal language model itself, including an adapter in it that is switched on.
        splitter: splits batches if memory runs out; None raises.
        processes: each reads a part of the text.
    """
    splitter = splitter or BatchSplitter("measuring the loss of", enabled=False)
    total, count = 0.0, 0
    with torch.no_grad():
        for number, batch in enumerate(divided(list(text), processes.count)):
            on_progress(1)
            if not processes.owns(number):
                continue
            if number < processes.count:
                verify_chunked_logits(model, batch.input_ids)
            for loss, tokens in splitter.over_batch(batch, lambda part: _sum_of_losses(model, part)):
                total, count = total + loss, count + tokens
    total, count = processes.sums(torch.tensor([total, count], dtype=torch.float64, device=model.device)).tolist()
    return total / count


def _sum_of_losses(model: PreTrainedModel, batch: Batch) -> tuple[float, int]:
    """Return the sum of losses over the labelled tokens of a batch, and their number."""
    hidden = hidden_states(model, batch.input_ids, batch.attention_mask)[batch.loss_positions]
    wanted = batch.targets
    losses = (
        cross_entropy(head_logits(model, hidden[part], exact=True), wanted[part], reduction="sum")
        for part in chunks(len(wanted))
    )
    return sum(map(float, losses)), len(wanted)


def text_windows(path: Path, tokenizer: Tokenizer, length: int) -> list[list[int]]:
    """Cut a text file into consecutive windows of `length` tokens; a last one of under 16 tokens is left out.

    Raises:
        UserError: the file cannot be read as UTF-8 or is too short.
    """
    try:
        text = path.read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        raise UserError(f"cannot read the general text {path}: {error}") from None
    ids = text_ids(tokenizer, text)
    windows = [ids[start : start + length] for start in range(0, len(ids), length)]
    windows = [window for window in windows if len(window) >= min(16, length)]
    if not windows:
        raise UserError(f"the general text {path} is too short: {len(ids)} tokens", "name a longer file")
    return windows
