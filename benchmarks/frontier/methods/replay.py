"""Methods that add a loss on text that the base generated: replay, and the KL divergence from the base."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import ClassVar

import torch
from peft import PeftModel
from torch import Tensor
from torch.nn.functional import cross_entropy, log_softmax

from benchmarks.frontier.methods.base import Method, Step
from benchmarks.frontier.testbed import Testbed
from folora_q.data.tokens import Batch, batches
from folora_q.models.adapters import AdapterPair, adapter_off
from folora_q.models.logits import head_logits, hidden_states
from folora_q.models.parts import base_of


@dataclass
class Replay(Method):
    """CFS: CE on the task + λ CE on text that the base generated; each step has an equal number of rows of both."""

    name: ClassVar[str] = "replay (CFS)"
    paper: ClassVar[str] = "arXiv 2505.13811"
    weight: float = 1.0

    def start(self, testbed: Testbed, model: PeftModel, pairs: Sequence[AdapterPair]) -> None:
        size = testbed.recipe.training.per_device_train_batch_size
        length = testbed.recipe.training.max_length
        own = [ids[:length] for ids in testbed.generated]
        self.own = [next(batches(own[i : i + size], size, testbed.base.device)) for i in range(0, len(own), size)]

    def penalty(self, testbed: Testbed, model: PeftModel, step: Step) -> Tensor | None:
        text = self.own[step.number % len(self.own)]
        return self.weight * cross_entropy(_logits(model, text), text.targets)


@dataclass
class BaseKL(Replay):
    """CE on the task + λ KL(base ‖ tuned) on text that the base generated; each step has as many rows of both.

    The base is the same model with the adapter off.
    """

    name: ClassVar[str] = "KL to the base"
    paper: ClassVar[str] = "a common regularizer"

    def penalty(self, testbed: Testbed, model: PeftModel, step: Step) -> Tensor | None:
        text = self.own[step.number % len(self.own)]
        with torch.no_grad(), adapter_off(model):
            log_p = log_softmax(_logits(model, text), -1)
        log_q = log_softmax(_logits(model, text), -1)
        return self.weight * (log_p.exp() * (log_p - log_q)).sum(-1).mean()


def _logits(model: PeftModel, text: Batch) -> Tensor:
    """Return the logits from which the text's tokens are predicted, (n, vocabulary)."""
    inner = base_of(model)
    return head_logits(inner, hidden_states(inner, text.input_ids, text.attention_mask)[text.loss_positions])
