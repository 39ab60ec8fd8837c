"""What is compared: every method over its learning rates, and ours with its parts changed one by one."""

from __future__ import annotations

from dataclasses import dataclass

from benchmarks.frontier.ground import DENSE, RANK
from benchmarks.frontier.methods.base import Method
from benchmarks.frontier.methods.gated import FoLoRA, FrozenGated, Gated, PenaltyOnly, ShuffledGated, UtilityOnly
from benchmarks.frontier.methods.lora import DecayedLoRA, DoRA, LoRA, MLPOnlyLoRA, RankStabilizedLoRA
from benchmarks.frontier.methods.losses import TMKL, Replay
from benchmarks.frontier.methods.null_space import ContrastiveLoRA, LoRANull
from benchmarks.frontier.methods.oplora import OPLoRA
from benchmarks.frontier.methods.starts import CorDA, SCLoRA

RATES = (3e-4, 1e-3, 3e-3)
OURS_RATES = (1e-3, 2e-3, 4e-3, 8e-3)
# What plain QLoRA is mostly run with: the forgetting that others compare with.
USUAL_RATE = 2e-4
# λ and the learning rate rise together (docs/method.md).
STRENGTHS = {
    1.0: (1e-3, 3e-3),
    4.0: (1e-3, 3e-3, 6e-3),
    16.0: (1e-3, 3e-3, 6e-3),
    64.0: (1e-3, 3e-3, 6e-3),
    256.0: (3e-3, 6e-3, 12e-3),
}
OURS = 64.0  # of the control, as of `Gated`
ABLATED_RATE = 3e-3

# The product's default rule; `Gated` has `step`. Without the gate on B's steps its rows are equally long.
FROZEN: dict[str, object] = {"rule": "frozen"}
EQUAL: dict[str, object] = FROZEN | {"places": ["a_start"], "ridge": 1e-4, "utility_ridge": 1e-4}
# As it was before its ridges were chosen; its ablations are of that.
COARSE: dict[str, object] = EQUAL | {"ridge": 0.01, "utility_ridge": 0.01}
# What ablations are called that change A frozen.
OF_FROZEN = "A frozen: "
# Settings of `Gated` itself; others are the recipe's.
OWN = ("proxy", "num_samples", "gate_lambda", "treatment")


@dataclass(frozen=True)
class Series:
    """One curve: points of a method that differ in learning rate."""

    name: str
    points: list[Method]


def methods() -> list[Series]:
    """The table, with what matters most first."""
    ours = [
        Series(f"gated, λ {strength:g}", [Gated(rate, strength) for rate in rates])
        for strength, rates in STRENGTHS.items()
    ]
    return [
        Series("LoRA", [LoRA(rate) for rate in (1e-4, USUAL_RATE, *RATES)]),
        *ours,
        Series("ours", [FrozenGated(rate) for rate in OURS_RATES]),
        Series("ours, rank 64", [FrozenGated(rate, r=4 * RANK) for rate in OURS_RATES]),
        Series("ours, rows equally long", [FrozenGated(rate, gate=EQUAL) for rate in (1e-4, *RATES[:2])]),
        Series("gated, A frozen", [Gated(rate, gate=EQUAL) for rate in (1e-3, 3e-3, 1e-2)]),
        Series("gated, A frozen, ridge 0.01", [Gated(rate, gate=COARSE) for rate in (1e-3, 3e-3, 1e-2)]),
        Series("control: γ shuffled, λ 64", [ShuffledGated(rate) for rate in STRENGTHS[OURS]]),
        Series("TMKL", [TMKL(rate) for rate in RATES]),
        Series("replay (CFS)", [Replay(rate) for rate in RATES]),
        Series("FoLoRA, as published", [FoLoRA(rate) for rate in RATES]),
        Series("LoRA-Null, A frozen", [LoRANull(rate) for rate in (3e-3, 1e-2, 3e-2)]),
        Series("frozen top-γ A", [ContrastiveLoRA(rate) for rate in (1e-3, 3e-3, 1e-2)]),
        Series("LoRA, decay 0.1", [DecayedLoRA(rate) for rate in RATES]),
        Series("LoRA, decay 0.3", [DecayedLoRA(rate, 0.3) for rate in RATES]),
        Series("LoRA, MLP only", [MLPOnlyLoRA(rate) for rate in RATES]),
        Series("OPLoRA", [OPLoRA(rate) for rate in RATES]),
        Series("CorDA", [CorDA(rate) for rate in RATES]),
        Series("SC-LoRA", [SCLoRA(rate) for rate in (1e-4, *RATES)]),
        Series("rsLoRA", [RankStabilizedLoRA(rate) for rate in (1e-4, *RATES[:2])]),
        Series("DoRA", [DoRA(rate) for rate in RATES]),
    ]


def ablations() -> list[Series]:
    """Ours with one thing changed, at one learning rate: each run is compared with a curve at its task loss.

    First λ 64, then A frozen with a ridge of 0.01, whose start is all that its gate does.
    """

    def changed(name: str, **changes: object) -> Series:
        own = {key: changes.pop(key) for key in OWN if key in changes}
        return Series(name, [Gated(ABLATED_RATE, gate=dict(changes), **own)])

    exact = {"rank": DENSE, "second_pass": False}
    # What either rule's start is made from.
    statistics: dict[str, dict[str, object]] = {
        "activations alike": {"covariance": "activation"},
        "no refinement": {"refinements": 0},
        "2 refinements": {"refinements": 2},
        "one pass": {"second_pass": False},
        "exact covariances": exact,
        "proxy: general prose": {"proxy": "prose"},
        "proxy: random tokens": {"proxy": "random"},
        "proxy: whole only": {"proxy": "whole"},
        "proxy: cut only": {"proxy": "cut"},
        "proxy: cut twice": {"proxy": "cut twice"},
        "16 samples": {"num_samples": 16},
        "32 samples": {"num_samples": 32},
        "rank 16": {"rank": 16},
        "rank 128": {"rank": 128},
        "ridge 0.1": {"ridge": 0.1, "utility_ridge": 0.1},
        "ridge 0.001": {"ridge": 0.001, "utility_ridge": 0.001},
        "ridge 0.001, cut twice": {"ridge": 0.001, "utility_ridge": 0.001, "proxy": "cut twice"},
        "ridge 0.0001, 2 refinements": {"ridge": 0.0001, "utility_ridge": 0.0001, "refinements": 2},
    }
    return [
        changed("as it is"),
        *(changed(name, **changes) for name, changes in statistics.items()),
        Series("penalty only", [PenaltyOnly(rate) for rate in (ABLATED_RATE, 1e-2)]),
        Series("utility only", [UtilityOnly(ABLATED_RATE)]),
        changed("A's start random, gated", start="random"),
        changed("A's start not gated", places=["a_step", "b_step"]),
        changed("A's step not gated", places=["a_start", "b_step"]),
        changed("B's step not gated", places=["a_start", "a_step"]),
        changed("proxy: from BOS", proxy="bos"),
        changed("proxy: as chat", proxy="chat"),
        changed("rank 8", rank=8),
        changed("floor 0.05", floor=0.05),
        changed("sharpness 2", sharpness=2.0),
        changed("sharpness 8 (hard)", sharpness=8.0),
        changed("first position dropped", treatment="first_dropped", **exact),
        changed("first position protected", treatment="first_protected", **exact),
        changed("robust to massive channels", treatment="robust", **exact),
        changed("shrunk by a tenth", treatment="shrunk", **exact),
        changed("spectral, A only", rule="spectral", places=["a_start", "a_step"]),
        *(changed(OF_FROZEN + name, **COARSE | changes) for name, changes in statistics.items()),
        Series(OF_FROZEN + "penalty only", [PenaltyOnly(rate, gate=COARSE) for rate in (ABLATED_RATE, 6e-3, 1e-2)]),
        Series(OF_FROZEN + "utility only", [UtilityOnly(ABLATED_RATE, gate=COARSE)]),
        changed(OF_FROZEN + "random start, gated", start="random", **COARSE),
    ]


def quick() -> list[Series]:
    """Few points, of what shares its statistics."""
    return [
        Series("LoRA", [LoRA(rate) for rate in RATES]),
        Series("ours", [FrozenGated(rate) for rate in OURS_RATES[1:3]]),
    ]
