"""How far the tuned model's predictions are from the base model's, on text that the base model wrote."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import dataclass

import torch
from peft import PeftModel
from torch.nn.functional import log_softmax

from folora_q.data.tokens import Batch
from folora_q.evaluation.logits import check_head, chunks, head_logits, hidden_states


@dataclass(frozen=True)
class Divergence:
    """Means over all predicted tokens.

    Attributes:
        kl_nats_per_token: KL(base ‖ tuned).
        top1_agreement: how often both find the same token most likely, between 0 and 1.
        tokens: how many predictions were compared.
    """

    kl_nats_per_token: float
    top1_agreement: float
    tokens: int


def divergence(
    model: PeftModel, batches: Iterable[Batch], on_progress: Callable[[int], None] = lambda batches: None
) -> Divergence:
    """Compare the model with its adapter switched off (base) and on (tuned).

    On text that the base model sampled, the mean is an unbiased estimate of the divergence over its own distribution.
    """
    base = model.get_base_model()
    kl, agreed, count = 0.0, 0, 0
    with torch.no_grad():
        for number, batch in enumerate(batches):
            if number == 0:
                check_head(base, batch.input_ids)
            predicted = batch.attention_mask[:, 1:].bool()
            inputs = batch.input_ids, batch.attention_mask
            with model.disable_adapter():
                hidden_base = hidden_states(base, *inputs)[:, :-1][predicted]
            hidden_tuned = hidden_states(base, *inputs)[:, :-1][predicted]
            for part in chunks(len(hidden_base)):
                with model.disable_adapter():  # an adapted head would otherwise answer for the base too
                    log_p = log_softmax(head_logits(base, hidden_base[part]), dim=-1)
                log_q = log_softmax(head_logits(base, hidden_tuned[part]), dim=-1)
                kl += float((log_p.exp() * (log_p - log_q)).sum())
                agreed += int((log_p.argmax(-1) == log_q.argmax(-1)).sum())
            count += len(hidden_base)
            on_progress(1)
    return Divergence(kl / count, agreed / count, count)
