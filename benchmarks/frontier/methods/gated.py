"""Ours, its parts taken away one by one, its control with shuffled quotients, and the paper's own rule."""

from __future__ import annotations

import random
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any, ClassVar

import torch
from peft import PeftModel
from torch import Tensor
from torch.optim import Optimizer

from benchmarks.frontier.ground import ALPHA, DENSE, LABELS, RANK, SEED, pairs_with
from benchmarks.frontier.methods.base import AdapterPair, Ground, Method
from benchmarks.frontier.methods.starts import FoLoRAStart
from folora_q.core import GatedOptimizer, SpectralAdamW, SpectralGate
from folora_q.data.windows import crops
from folora_q.evaluation.loss import GENERAL_TEXT, text_windows
from folora_q.models.adapters import freeze_first, start
from folora_q.recipe.schema import GateSection, sketch_rank


@dataclass
class Gated(Method):
    """The recipe's gate around AdamW (docs/method.md, section 4).

    Attributes:
        gate_lambda: λ.
        gate: other settings of the recipe's section `gate`; its rule is `step` unless it is given here.
        proxy: text of which Σp is taken: the base's own ("own"), it whole or cut alone ("whole", "cut"), with a second
            crop of each text ("cut twice"), what it wrote from BOS or as a chat ("bos", "chat"), public-domain prose
            ("prose"), or random tokens ("random").
        num_samples: so many texts, in place of all.
        treatment: of exact covariances (benchmarks/frontier/covariances.py).
    """

    gate_lambda: float = 64.0
    gate: dict[str, object] = field(default_factory=dict)
    proxy: str = "own"
    num_samples: int | None = None
    treatment: str = "plain"
    kind: ClassVar[type[SpectralGate]] = SpectralGate

    @property
    def section(self) -> GateSection:
        return GateSection(**{"rule": "step", "gate_lambda": self.gate_lambda} | self.gate)

    def settings(self) -> dict[str, Any]:
        # The recipe's defaults too: when they change, these are other runs.
        return super().settings() | {"gate": self.section.model_dump(), "labels": LABELS}

    def text(self, ground: Ground) -> list[Sequence[int]]:
        """The proxy text, as sequences."""
        own = ground.own[: self.num_samples]
        lengths = [len(ids) for ids in own]
        if self.proxy == "own":
            return ground.shown(own)
        if self.proxy in ("bos", "chat"):
            return ground.shown([ids for ids, source in zip(own, ground.sources, strict=False) if source == self.proxy])
        if self.proxy in ("whole", "cut"):
            half = slice(len(own)) if self.proxy == "whole" else slice(len(own), None)
            return ground.shown(own)[half]
        if self.proxy == "cut twice":
            return [*ground.shown(own), *crops(own, SEED + 2)]
        if self.proxy == "prose":
            # From its end: its beginning is measured on.
            return text_windows(GENERAL_TEXT, ground.tokenizer, max(lengths))[::-1][: len(own)]
        chance = random.Random(0)
        return [[chance.randrange(len(ground.tokenizer)) for _ in range(length)] for length in lengths]

    def start(self, ground: Ground, model: PeftModel, pairs: Sequence[AdapterPair]) -> None:
        key = f"{self.proxy}{self.num_samples or ''}"
        public = ground.recipe.proxy.public_share if self.proxy == "own" else 0.0
        self.of_layers = ground.gates(
            model, self.section, self.text(ground), key, self.kind, self.treatment, public=public
        )
        start(pairs, self.of_layers, self.section)
        if self.section.rule == "frozen":
            freeze_first(pairs)

    def optimizer(self, ground: Ground, model: PeftModel, pairs: Sequence[AdapterPair]) -> Optimizer:
        if self.section.rule == "frozen":
            return self.adamw(model)
        places = self.section.places
        adapters = pairs_with(self.of_layers, pairs)
        if self.section.rule == "spectral":
            return SpectralAdamW(adapters, lr=self.learning_rate, complement=self.section.complement)
        return GatedOptimizer(
            self.adamw(model),
            adapters,
            gate_a="a_step" in places,
            gate_b="b_step" in places,
            refresh_every=self.section.refresh_every,
        )


@dataclass
class FrozenGated(Gated):
    """`gate.rule: frozen`, with an adapter of any rank.

    Attributes:
        r: the adapter's rank; its scale stays as it is.
    """

    gate: dict[str, object] = field(default_factory=lambda: {"rule": "frozen"})
    r: int = 2 * RANK

    @property
    def section(self) -> GateSection:
        return GateSection(**{"rank": sketch_rank(self.r)} | self.gate)

    def lora(self, ground: Ground) -> dict[str, Any]:
        return {"r": self.r, "lora_alpha": ALPHA * self.r // RANK}


class ShuffledGate(SpectralGate):
    """A gate whose values are as they were, but each belongs to another direction than the one it was made for."""

    def gate_of(self, quotients: Tensor) -> Tensor:
        values = super().gate_of(quotients)
        if values.ndim == 0:
            return values
        order = torch.randperm(values.shape[-1], generator=torch.Generator().manual_seed(values.shape[-1]))
        return values[..., order]


@dataclass
class ShuffledGated(Gated):
    """The decisive control: the same operators' values, dealt to random directions, over the whole space."""

    gate: dict[str, object] = field(default_factory=lambda: {"rank": DENSE, "second_pass": False})
    kind: ClassVar[type[SpectralGate]] = ShuffledGate


class PenaltyOnlyGate(SpectralGate):
    """γ measures the penalty alone: every direction counts as equally useful."""

    def __init__(self, **state: Any) -> None:
        even = torch.eye(len(state["utility_gram"]), dtype=torch.float64)
        super().__init__(**state | {"utility_gram": even, "utility_tail": 1.0})


class UtilityOnlyGate(SpectralGate):
    """γ measures the utility alone: every direction counts as equally costly."""

    def __init__(self, **state: Any) -> None:
        even = torch.eye(len(state["penalty_gram"]), dtype=torch.float64)
        super().__init__(**state | {"penalty_gram": even, "penalty_tail": 1.0})


@dataclass
class PenaltyOnly(Gated):
    """The quotient's numerator taken away."""

    kind: ClassVar[type[SpectralGate]] = PenaltyOnlyGate


@dataclass
class UtilityOnly(Gated):
    """The quotient's denominator taken away."""

    kind: ClassVar[type[SpectralGate]] = UtilityOnlyGate


@dataclass
class FoLoRA(FoLoRAStart):
    """FoLoRA as the paper has it (arXiv 2606.00132): its start, spectral Adam on A, dense covariances, AdamW on B."""

    gate_lambda: float = 1.0
    floor: float = 0.3

    def optimizer(self, ground: Ground, model: PeftModel, pairs: Sequence[AdapterPair]) -> Optimizer:
        section = GateSection(rule="spectral", rank=DENSE, gate_lambda=self.gate_lambda, floor=self.floor)
        return SpectralAdamW(pairs_with(ground.gates(model, section, covariance="rows"), pairs), lr=self.learning_rate)
