"""EVA: A starts at the leading directions of the task's inputs."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from benchmarks.frontier.methods.chosen_rows import ChosenRows


@dataclass
class EVA(ChosenRows):
    """EVA's initialization: A's rows are the leading eigenvectors of Σt. Both matrices are trained.

    Every layer has the same rank; EVA's redistribution of ranks is left out.
    """

    name: ClassVar[str] = "EVA"
    paper: ClassVar[str] = "arXiv 2410.07170"
    freeze_a: bool = False

    def rows(self, penalty: Tensor, utility: Tensor, rank: int) -> Tensor:
        return torch.linalg.eigh(utility).eigenvectors[:, -rank:].T.flip(0)
