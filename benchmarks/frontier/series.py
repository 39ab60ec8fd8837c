"""All series: every method over its learning rates, and variations of this project's method."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from benchmarks.frontier.methods.base import Method
from benchmarks.frontier.methods.contrastive import ContrastiveLoRA
from benchmarks.frontier.methods.corda import CorDA
from benchmarks.frontier.methods.eva import EVA
from benchmarks.frontier.methods.folora import FoLoRA
from benchmarks.frontier.methods.gated import Gated, PenaltyOnly, SharesShuffled, UtilityOnly
from benchmarks.frontier.methods.lora import DecayedLoRA, DoRA, LoRA, MLPOnlyLoRA, RankStabilizedLoRA
from benchmarks.frontier.methods.lora_null import LoRANull
from benchmarks.frontier.methods.oft import OFT
from benchmarks.frontier.methods.oplora import OPLoRA
from benchmarks.frontier.methods.replay import BaseKL, Replay
from benchmarks.frontier.methods.sc_lora import SCLoRA
from benchmarks.frontier.methods.tmkl import TMKL
from benchmarks.frontier.testbed import RANK


@dataclass(frozen=True)
class Series:
    """One curve: points of a method that differ in learning rate."""

    name: str
    points: list[Method]


@dataclass(frozen=True)
class Variation:
    """A method under other settings, as a series with its own name and learning rates."""

    name: str
    method: type[Method]
    learning_rates: Sequence[float]
    settings: Mapping[str, Any] = field(default_factory=dict)


# Without a gate on B's steps: all rows of A have the same length, so that the usual learning rates suit.
EQUAL_ROWS = {"rule": "frozen", "places": ["a_start"]}
STEP_RATES = (1e-3, 3e-3)


def _step_rule(gate_lambda: float) -> dict[str, Any]:
    return {"gate": {"rule": "step", "rank": 64, "gate_lambda": gate_lambda}, "r": RANK}


# In the order of the tables: the most important ones first.
REGISTRY: tuple[type[Method] | Variation, ...] = (
    LoRA,
    Gated,
    Variation("ours, rank 64", Gated, Gated.learning_rates, {"r": 4 * RANK}),
    SharesShuffled,
    UtilityOnly,
    PenaltyOnly,
    Variation("control: rows equally long", Gated, (1e-4, 3e-4, 1e-3), {"gate": EQUAL_ROWS}),
    Variation("rule step, λ 1", Gated, STEP_RATES, _step_rule(1.0)),
    Variation("rule step, λ 64", Gated, STEP_RATES, _step_rule(64.0)),
    BaseKL,
    Replay,
    TMKL,
    OFT,
    EVA,
    FoLoRA,
    LoRANull,
    ContrastiveLoRA,
    DecayedLoRA,
    MLPOnlyLoRA,
    OPLoRA,
    CorDA,
    SCLoRA,
    RankStabilizedLoRA,
    DoRA,
)


def methods() -> list[Series]:
    """Return all series, in the order of the tables."""
    return [_series(entry) for entry in REGISTRY]


def quick() -> list[Series]:
    """Return two series with few points, which share their statistics."""
    return [_series(LoRA), _series(Variation(Gated.name, Gated, Gated.learning_rates[1:3]))]


def _series(entry: type[Method] | Variation) -> Series:
    if not isinstance(entry, Variation):
        entry = Variation(entry.name, entry, entry.learning_rates)
    return Series(entry.name, [entry.method(rate, **entry.settings) for rate in entry.learning_rates])
