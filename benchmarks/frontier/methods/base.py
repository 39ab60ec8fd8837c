"""What a method is: plain LoRA, of which every method changes what its paper changes, and nothing else."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict, dataclass
from typing import Any, ClassVar

from peft import PeftModel
from torch import Tensor
from torch.optim import AdamW, Optimizer

from benchmarks.frontier.ground import Ground
from folora_q.models.adapters import AdapterPair


@dataclass
class Method:
    """Plain LoRA with AdamW (arXiv 2106.09685), and the places where a method may differ.

    Attributes:
        sixteen_bit: it changes the base's weights, which 4 bits cannot hold.
    """

    learning_rate: float
    sixteen_bit: ClassVar[bool] = False

    def settings(self) -> dict[str, Any]:
        """Everything that makes one run of it differ from another."""
        return {"method": type(self).__name__, **asdict(self)}

    def lora(self, ground: Ground) -> dict[str, Any]:
        """Settings of `peft.LoraConfig` that differ from plain LoRA's."""
        return {}

    def tuned(self, ground: Ground, seed: int) -> PeftModel:
        """The base with a new adapter."""
        return ground.tuned(seed, self.sixteen_bit, **self.lora(ground))

    def start(self, ground: Ground, model: PeftModel, pairs: Sequence[AdapterPair]) -> None:
        """Change the adapter, or the base under it, before the first step."""

    def optimizer(self, ground: Ground, model: PeftModel, pairs: Sequence[AdapterPair]) -> Optimizer:
        """The optimizer of all trained parameters."""
        return self.adamw(model)

    def adamw(self, model: PeftModel, weight_decay: float = 0.0) -> AdamW:
        trained = [p for p in model.parameters() if p.requires_grad]
        return AdamW(trained, lr=self.learning_rate, weight_decay=weight_decay)

    def penalty(self, ground: Ground, model: PeftModel, step: Step) -> Tensor | None:
        """What is added to the task's loss."""
        return None

    def after_step(self, pairs: Sequence[AdapterPair]) -> None:
        """What is done to the adapter after each step."""


@dataclass(frozen=True)
class Step:
    """A batch as a penalty sees it: its n trained tokens, `wanted`, and the tuned model's logits for them, (n, v)."""

    number: int
    input_ids: Tensor
    attention_mask: Tensor
    counted: Tensor  # (b, t - 1) bool
    wanted: Tensor
    logits: Tensor
