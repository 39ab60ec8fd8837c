"""LoRA as people run it: weight decay, rsLoRA, DoRA, MLP layers only. All but the first are PEFT's options."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from peft import PeftModel
from torch.optim import Optimizer

from benchmarks.frontier.methods.base import AdapterPair, Ground, Method

MLP = ["gate_proj", "up_proj", "down_proj"]


@dataclass
class LoRA(Method):
    """Plain LoRA."""


@dataclass
class DecayedLoRA(Method):
    """AdamW's decoupled decay on A and B: the cheapest control of ‖ΔW‖ (docs of the sweep: methods.md 6.2)."""

    weight_decay: float = 0.1

    def optimizer(self, ground: Ground, model: PeftModel, pairs: Sequence[AdapterPair]) -> Optimizer:
        return self.adamw(model, self.weight_decay)


@dataclass
class RankStabilizedLoRA(Method):
    """rsLoRA, arXiv 2312.03732: the scale is α/√r in place of α/r."""

    def lora(self, ground: Ground) -> dict[str, Any]:
        return {"use_rslora": True}


@dataclass
class DoRA(Method):
    """DoRA, arXiv 2402.09353: direction by LoRA, the norm of each row of W trained apart."""

    def lora(self, ground: Ground) -> dict[str, Any]:
        return {"use_dora": True}


@dataclass
class MLPOnlyLoRA(Method):
    """LoRA on the MLP alone: the best trade-off of PEFT's own comparison (method_comparison/MetaMathQA)."""

    def lora(self, ground: Ground) -> dict[str, Any]:
        return {"target_modules": MLP}
