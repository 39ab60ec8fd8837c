"""OPLoRA: ΔW stays outside of W's leading singular subspaces, on both sides, at every step."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import ClassVar

import torch
from peft import PeftModel
from peft.utils.integrations import dequantize_module_weight
from torch import Tensor

from benchmarks.frontier.methods.base import Method
from benchmarks.frontier.testbed import Testbed
from folora_q.models.adapters import AdapterPair


@dataclass
class OPLoRA(Method):
    """ΔW = (I - U_k U_kᵀ) B A (I - V_k V_kᵀ), enforced by projecting A and B after every step.

    Attributes:
        k: the paper uses 128 for layers 4,096 wide; the demo's model is 576 wide.
    """

    name: ClassVar[str] = "OPLoRA"
    paper: ClassVar[str] = "arXiv 2510.13003"
    k: int = 64

    def start(self, testbed: Testbed, model: PeftModel, pairs: Sequence[AdapterPair]) -> None:
        self.subspaces: list[tuple[Tensor, Tensor]] = []
        for pair in pairs:
            weight = dequantize_module_weight(pair.module.get_base_layer()).float()
            u, _, vt = torch.linalg.svd(weight, full_matrices=False)
            self.subspaces.append((u[:, : self.k].clone(), vt[: self.k].clone()))
        self.after_step(pairs)

    @torch.no_grad()
    def after_step(self, pairs: Sequence[AdapterPair]) -> None:
        for pair, (u, vt) in zip(pairs, self.subspaces, strict=True):
            pair.b.sub_(u @ (u.T @ pair.b))
            pair.a.sub_((pair.a @ vt.T) @ vt)
