"""Plain LoRA, and common variants of it: weight decay, rsLoRA, DoRA, MLP layers only."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, ClassVar

from peft import PeftModel
from torch.optim import Optimizer

from benchmarks.frontier.methods.base import Method
from benchmarks.frontier.testbed import Testbed
from folora_q.models.adapters import AdapterPair

MLP = ["gate_proj", "up_proj", "down_proj"]


@dataclass
class LoRA(Method):
    """Plain LoRA, with which all others are compared."""

    name: ClassVar[str] = "LoRA"
    paper: ClassVar[str] = "arXiv 2106.09685"


@dataclass
class DecayedLoRA(Method):
    """LoRA with decoupled weight decay on A and B: the simplest way to limit ‖ΔW‖."""

    name: ClassVar[str] = "LoRA, decay 0.1"
    paper: ClassVar[str] = "a control of github.com/Guy-Bilitski/UIOrthoLoRA"
    weight_decay: float = 0.1

    def optimizer(self, testbed: Testbed, model: PeftModel, pairs: Sequence[AdapterPair]) -> Optimizer:
        return self.adamw(model, self.weight_decay)


@dataclass
class RankStabilizedLoRA(Method):
    """rsLoRA: the scale is α/√r instead of α/r."""

    name: ClassVar[str] = "rsLoRA"
    paper: ClassVar[str] = "arXiv 2312.03732"

    def lora(self, testbed: Testbed) -> dict[str, Any]:
        return {"use_rslora": True}


@dataclass
class DoRA(Method):
    """DoRA: LoRA changes the direction of each row of W, and its norm is trained separately."""

    name: ClassVar[str] = "DoRA"
    paper: ClassVar[str] = "arXiv 2402.09353"

    def lora(self, testbed: Testbed) -> dict[str, Any]:
        return {"use_dora": True}


@dataclass
class MLPOnlyLoRA(Method):
    """LoRA on the MLP layers only, which has the best trade-off in PEFT's comparison of methods."""

    name: ClassVar[str] = "LoRA, MLP only"
    paper: ClassVar[str] = "PEFT, method_comparison/MetaMathQA"

    def lora(self, testbed: Testbed) -> dict[str, Any]:
        return {"target_modules": MLP}
