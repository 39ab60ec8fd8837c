"""Which drift on the base's own text tells methods apart: tr(ΔW Σp ΔWᵀ), summed over layers, plain or Fisher-weighted?

A predictor of forgetting has to put adapters in the order of the KL that is measured.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from dataclasses import dataclass
from statistics import fmean

from torch import Tensor

from benchmarks.frontier.ground import Ground
from benchmarks.frontier.measuring import Yardstick
from benchmarks.frontier.methods.base import AdapterPair, Method
from benchmarks.frontier.methods.gated import Gated
from benchmarks.frontier.methods.lora import LoRA
from benchmarks.frontier.methods.null_space import ContrastiveLoRA, LoRANull
from benchmarks.frontier.training import train
from folora_q.models.adapters import adapter_pairs

Factors = tuple[Tensor, Tensor]
COMPARED: list[Method] = [LoRA(1e-3), Gated(3e-3), LoRANull(1e-2), ContrastiveLoRA(3e-3)]


@dataclass(frozen=True)
class Drift:
    """Of one tuned model: both drifts, and what was measured. `plain` in outputs squared, `weighted` in nats."""

    method: str
    plain: float
    weighted: float
    kl: float
    task_loss: float


def drifts(ground: Ground, steps: int, methods: list[Method] = COMPARED) -> list[Drift]:
    """Train each method with one seed, and measure."""
    yardstick = Yardstick(ground)
    updates: list[dict[str, Factors]] = []
    measured = []
    for method in methods:
        model, _ = train(ground, dataclasses.replace(method), seed=0, steps=steps)
        measured.append(yardstick.measure(model))
        updates.append({pair.name: _factors(pair) for pair in adapter_pairs(model)})
        model.unload()
    found = {}
    fresh = ground.tuned(seed=0)
    for kind in ("activation", "fisher"):
        ground.forget()  # two kinds of exact covariances take gigabytes each
        covariances = ground.exact_covariances(fresh, kind)
        penalties = {layer: penalty.matrix for layer, (penalty, _) in covariances.items()}
        found[kind] = [drift(update, penalties) for update in updates]
    fresh.unload()
    return [
        Drift(
            f"{type(method).__name__} {method.learning_rate:g}", plain, weighted, fmean(m.kl.values()), m.loss["task"]
        )
        for method, plain, weighted, m in zip(methods, found["activation"], found["fisher"], measured, strict=True)
    ]


def _factors(pair: AdapterPair) -> Factors:
    a, b = (parameter.detach().double().cpu() for parameter in (pair.a, pair.b))
    return a, pair.scale * b


def drift(update: Mapping[str, Factors], penalties: Mapping[str, Tensor]) -> float:
    """tr(ΔW Σp ΔWᵀ) over all layers, for ΔW = B A given as (A, B)."""
    return sum(float(((a @ penalties[layer] @ a.T) * (b.T @ b)).sum()) for layer, (a, b) in update.items())
