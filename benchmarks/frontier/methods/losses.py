"""Methods that add to the loss: the base's distribution on the task's text, or text that it generated."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from peft import PeftModel
from torch import Tensor
from torch.nn.functional import cross_entropy, log_softmax

from benchmarks.frontier.methods.base import AdapterPair, Ground, Method, Step
from folora_q.data.tokens import Batch, batches
from folora_q.models.adapters import adapter_off
from folora_q.models.logits import head_logits, hidden_states

# Where the base gives the right token all but this, what is left of its distribution is noise.
CERTAIN = 1e-4


@dataclass
class TMKL(Method):
    """Non-target KL on the task's text, arXiv 2605.29498: CE + λ KL(p_base without y ‖ p without y).

    Both distributions lose the right token and are made whole again, in float32; positions where p_base(y) > 1 - 1e-4
    are left out. The base is the same model with the adapter off.
    """

    weight: float = 1.0

    def penalty(self, ground: Ground, model: PeftModel, step: Step) -> Tensor | None:
        inner = model.get_base_model()
        with torch.no_grad(), adapter_off(model):
            hidden = hidden_states(inner, step.input_ids, step.attention_mask)[:, :-1][step.counted]
            of_base = head_logits(inner, hidden)
        return self.weight * non_target_kl(of_base, step.logits, step.wanted)


def non_target_kl(of_base: Tensor, tuned: Tensor, wanted: Tensor) -> Tensor:
    """Mean over positions of KL(p^{\\y} ‖ q^{\\y}), from logits (n, vocabulary) and right tokens (n,)."""
    unsure = of_base.softmax(-1).gather(-1, wanted[:, None])[:, 0] <= 1 - CERTAIN
    right = torch.zeros_like(of_base, dtype=torch.bool).scatter_(-1, wanted[:, None], True)
    log_p, log_q = (log_softmax(logits.masked_fill(right, float("-inf")), -1) for logits in (of_base, tuned))
    terms = (log_p.exp() * (log_p - log_q)).masked_fill(right, 0.0).sum(-1)
    return terms[unsure].sum() / len(wanted)


@dataclass
class Replay(Method):
    """CFS, arXiv 2505.13811: CE on the task + λ CE on text that the base wrote itself, as many rows of it a step."""

    weight: float = 1.0

    def start(self, ground: Ground, model: PeftModel, pairs: Sequence[AdapterPair]) -> None:
        size = ground.recipe.training.per_device_train_batch_size
        length = ground.recipe.training.max_length
        own = [ids[:length] for ids in ground.own]
        self.own = [next(batches(own[i : i + size], size, ground.base.device)) for i in range(0, len(own), size)]

    def penalty(self, ground: Ground, model: PeftModel, step: Step) -> Tensor | None:
        text = self.own[step.number % len(self.own)]
        return self.weight * cross_entropy(_logits(model, text), text.targets)


@dataclass
class BaseKL(Replay):
    """CE on the task + λ KL(base ‖ tuned) on text that the base generated, as many rows of it a step.

    The base is the same model with the adapter off.
    """

    def penalty(self, ground: Ground, model: PeftModel, step: Step) -> Tensor | None:
        text = self.own[step.number % len(self.own)]
        with torch.no_grad(), adapter_off(model):
            log_p = log_softmax(_logits(model, text), -1)
        log_q = log_softmax(_logits(model, text), -1)
        return self.weight * (log_p.exp() * (log_p - log_q)).sum(-1).mean()


def _logits(model: PeftModel, text: Batch) -> Tensor:
    """At the positions from which a token of the text is predicted, (n, vocabulary)."""
    inner = model.get_base_model()
    return head_logits(inner, hidden_states(inner, text.input_ids, text.attention_mask)[text.loss_positions])
