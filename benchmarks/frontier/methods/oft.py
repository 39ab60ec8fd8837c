"""OFT: every layer's input is rotated block by block, and no matrix is added to W."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

from peft import OFTConfig, PeftModel

from benchmarks.frontier.methods.base import USUAL_RATE, Method
from benchmarks.frontier.testbed import TARGET_MODULES, TASK_TYPE, Testbed


@dataclass
class OFT(Method):
    """Orthogonal fine-tuning as PEFT implements it: Cayley rotations of blocks of inputs."""

    name: ClassVar[str] = "OFT"
    paper: ClassVar[str] = "arXiv 2506.19847"
    learning_rates: ClassVar[tuple[float, ...]] = (USUAL_RATE, 1e-3)
    block_size: int = 32

    def tuned(self, testbed: Testbed, seed: int) -> PeftModel:
        config = OFTConfig(oft_block_size=self.block_size, target_modules=TARGET_MODULES, task_type=TASK_TYPE)
        return testbed.adapted(seed, config)
