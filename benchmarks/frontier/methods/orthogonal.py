"""OFT: the input of every layer is rotated block by block, and no matrix is added."""

from __future__ import annotations

from dataclasses import dataclass

from peft import OFTConfig, PeftModel

from benchmarks.frontier.ground import COMMON
from benchmarks.frontier.methods.base import Ground, Method


@dataclass
class OFT(Method):
    """Orthogonal fine-tuning, arXiv 2506.19847, as PEFT has it: Cayley rotations of blocks of inputs."""

    block_size: int = 32

    def tuned(self, ground: Ground, seed: int) -> PeftModel:
        return ground.adapted(seed, OFTConfig(oft_block_size=self.block_size, **COMMON))
