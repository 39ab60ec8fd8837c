"""The interface of methods: plain LoRA with AdamW, of which each method changes only what its paper changes."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict, dataclass
from typing import Any, ClassVar

from peft import PeftModel
from torch import Tensor
from torch.optim import AdamW, Optimizer

from benchmarks.frontier.testbed import Testbed
from folora_q.models.adapters import AdapterPair

# What plain QLoRA usually runs with, and larger rates, with which it learns more.
USUAL_RATE = 2e-4
RATES = (USUAL_RATE, 5e-4, 1e-3)


@dataclass
class Method:
    """A method with its settings, one of which is the learning rate. A copy of it runs once.

    Dataclass fields are settings, and identify a run in the results. Class attributes describe the method.

    Attributes:
        name: its name in tables and plots.
        paper: where it was published.
        learning_rates: those that it runs with.
        sixteen_bit: whether it changes the base's weights, which is impossible in 4 bits.
    """

    learning_rate: float
    name: ClassVar[str]
    paper: ClassVar[str]
    learning_rates: ClassVar[tuple[float, ...]] = RATES
    sixteen_bit: ClassVar[bool] = False

    def settings(self) -> dict[str, Any]:
        """Return everything that distinguishes its runs from others."""
        return {"method": type(self).__name__, **asdict(self)}

    def lora(self, testbed: Testbed) -> dict[str, Any]:
        """Return the settings of `peft.LoraConfig` that differ from plain LoRA's."""
        return {}

    def tuned(self, testbed: Testbed, seed: int) -> PeftModel:
        """Return the base with a new adapter."""
        return testbed.tuned(seed, self.sixteen_bit, **self.lora(testbed))

    def start(self, testbed: Testbed, model: PeftModel, pairs: Sequence[AdapterPair]) -> None:
        """Change the adapter, or the base under it, before the first step."""

    def optimizer(self, testbed: Testbed, model: PeftModel, pairs: Sequence[AdapterPair]) -> Optimizer:
        """Return the optimizer of all trained parameters."""
        return self.adamw(model)

    def adamw(self, model: PeftModel, weight_decay: float = 0.0) -> AdamW:
        """Return AdamW over all trained parameters, with the method's learning rate."""
        trained = [p for p in model.parameters() if p.requires_grad]
        return AdamW(trained, lr=self.learning_rate, weight_decay=weight_decay)

    def penalty(self, testbed: Testbed, model: PeftModel, step: Step) -> Tensor | None:
        """Return the term that is added to the task's loss."""
        return None

    def after_step(self, pairs: Sequence[AdapterPair]) -> None:
        """Change the adapter after each step."""


@dataclass(frozen=True)
class Step:
    """A batch as a penalty sees it: its n trained tokens, `wanted`, and the tuned model's logits for them, (n, v)."""

    number: int
    input_ids: Tensor
    attention_mask: Tensor
    counted: Tensor  # (b, t - 1) bool
    wanted: Tensor
    logits: Tensor
