"""TMKL: a KL divergence from the base on the task's text, over all tokens but the right one."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import torch
from peft import PeftModel
from torch import Tensor
from torch.nn.functional import log_softmax

from benchmarks.frontier.methods.base import Method, Step
from benchmarks.frontier.testbed import Testbed
from folora_q.models.adapters import adapter_off
from folora_q.models.logits import head_logits, hidden_states
from folora_q.models.parts import base_of

# Where the base's probability of the right token is within this of 1, the rest of its distribution is noise.
CERTAIN = 1e-4


@dataclass
class TMKL(Method):
    """The loss CE + λ KL(p_base without y ‖ p without y), with y the right token.

    Both distributions are renormalized without y, in float32; positions with p_base(y) > 1 - 1e-4 are left out. The
    base is the same model with the adapter off.
    """

    name: ClassVar[str] = "TMKL"
    paper: ClassVar[str] = "arXiv 2605.29498"
    weight: float = 1.0

    def penalty(self, testbed: Testbed, model: PeftModel, step: Step) -> Tensor | None:
        inner = base_of(model)
        with torch.no_grad(), adapter_off(model):
            hidden = hidden_states(inner, step.input_ids, step.attention_mask)[:, :-1][step.counted]
            base_logits = head_logits(inner, hidden)
        return self.weight * non_target_kl(base_logits, step.logits, step.wanted)


def non_target_kl(base: Tensor, tuned: Tensor, wanted: Tensor) -> Tensor:
    """Return the mean over positions of KL(p^{\\y} ‖ q^{\\y}), from logits (n, vocabulary) and right tokens (n,)."""
    unsure = base.softmax(-1).gather(-1, wanted[:, None])[:, 0] <= 1 - CERTAIN
    right = torch.zeros_like(base, dtype=torch.bool).scatter_(-1, wanted[:, None], True)
    log_p, log_q = (log_softmax(logits.masked_fill(right, float("-inf")), -1) for logits in (base, tuned))
    terms = (log_p.exp() * (log_p - log_q)).masked_fill(right, 0.0).sum(-1)
    return terms[unsure].sum() / len(wanted)
