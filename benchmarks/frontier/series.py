"""What is compared: every method over its learning rates."""

from __future__ import annotations

from dataclasses import dataclass

from benchmarks.frontier.ground import RANK
from benchmarks.frontier.methods.base import Method
from benchmarks.frontier.methods.gated import FoLoRA, Gated, PenaltyOnly, SharesShuffled, UtilityOnly
from benchmarks.frontier.methods.lora import DecayedLoRA, DoRA, LoRA, MLPOnlyLoRA, RankStabilizedLoRA
from benchmarks.frontier.methods.losses import TMKL, BaseKL, Replay
from benchmarks.frontier.methods.null_space import EVA, ContrastiveLoRA, LoRANull
from benchmarks.frontier.methods.oplora import OPLoRA
from benchmarks.frontier.methods.orthogonal import OFT
from benchmarks.frontier.methods.starts import CorDA, SCLoRA

# What plain QLoRA is mostly run with: the forgetting that others compare with.
USUAL_RATE = 2e-4
RATES = (USUAL_RATE, 5e-4, 1e-3)
OURS_RATES = (1e-3, 2e-3, 4e-3, 8e-3)
# Of rows of PEFT's mean length, in directions that hold most of the task's gradient.
LEADING_RATES = (1e-4, 3e-4, 1e-3)
STEP_RATES = (1e-3, 3e-3)
STEP: dict[str, object] = {"rule": "step", "rank": 64}
# Without the gate on B's steps: A's rows are equally long.
EQUAL: dict[str, object] = {"rule": "frozen", "places": ["a_start"]}


@dataclass(frozen=True)
class Series:
    """One curve: points of a method that differ in learning rate."""

    name: str
    points: list[Method]


def methods() -> list[Series]:
    """The table, with what matters most first."""
    return [
        Series("LoRA", [LoRA(rate) for rate in RATES]),
        Series("ours", [Gated(rate) for rate in OURS_RATES]),
        Series("ours, rank 64", [Gated(rate, r=4 * RANK) for rate in OURS_RATES]),
        Series("control: shares shuffled", [SharesShuffled(rate) for rate in OURS_RATES]),
        Series("control: Σp = I", [UtilityOnly(rate) for rate in OURS_RATES]),
        Series("control: Σt = I", [PenaltyOnly(rate) for rate in OURS_RATES]),
        Series("control: rows equally long", [Gated(rate, gate=EQUAL) for rate in LEADING_RATES]),
        Series("rule step, λ 1", [Gated(rate, STEP | {"gate_lambda": 1.0}, RANK) for rate in STEP_RATES]),
        Series("rule step, λ 64", [Gated(rate, STEP | {"gate_lambda": 64.0}, RANK) for rate in STEP_RATES]),
        Series("KL to the base", [BaseKL(rate) for rate in RATES]),
        Series("replay (CFS)", [Replay(rate) for rate in RATES]),
        Series("TMKL", [TMKL(rate) for rate in RATES]),
        Series("OFT", [OFT(rate) for rate in (USUAL_RATE, 1e-3)]),
        Series("EVA", [EVA(rate) for rate in RATES]),
        Series("FoLoRA, as published", [FoLoRA(rate) for rate in (3e-4, 1e-3, 3e-3)]),
        Series("LoRA-Null, A frozen", [LoRANull(rate) for rate in (3e-3, 1e-2, 3e-2)]),
        Series("frozen top-γ A", [ContrastiveLoRA(rate) for rate in (1e-4, 1e-3, 3e-3)]),
        Series("LoRA, decay 0.1", [DecayedLoRA(rate) for rate in RATES]),
        Series("LoRA, MLP only", [MLPOnlyLoRA(rate) for rate in RATES]),
        Series("OPLoRA", [OPLoRA(rate) for rate in RATES]),
        Series("CorDA", [CorDA(rate) for rate in RATES]),
        Series("SC-LoRA", [SCLoRA(rate) for rate in RATES]),
        Series("rsLoRA", [RankStabilizedLoRA(rate) for rate in RATES]),
        Series("DoRA", [DoRA(rate) for rate in RATES]),
    ]


def quick() -> list[Series]:
    """Few points, of what shares its statistics."""
    return [Series("LoRA", [LoRA(rate) for rate in RATES]), Series("ours", [Gated(rate) for rate in OURS_RATES[1:3]])]
