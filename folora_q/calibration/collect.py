"""Collect statistics of both texts at every adapted input, and compute the gates."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import NamedTuple

import torch
from peft import PeftModel

from folora_q.calibration.hooks import shared_inputs
from folora_q.calibration.penalty_cache import CachedPenalty, rounded
from folora_q.calibration.reading import Reading, Text
from folora_q.core import (
    CovarianceSketch,
    LowRankCovariance,
    ProjectedCovariance,
    SpectralGate,
    joint_basis,
    normalizers,
    refined_basis,
)
from folora_q.data.batch_splitting import BatchSplitter
from folora_q.data.tokens import count_tokens
from folora_q.distributed.processes import ONE, Processes
from folora_q.errors import RunError, first_line
from folora_q.models.adapters import adapter_off, adapter_pairs
from folora_q.progress import StageTimer
from folora_q.recipe.gate import GateSection

GIB = 2**30
BYTES = 4  # of a number in a sketch or a basis


@dataclass(frozen=True)
class StatisticsSettings:
    """How statistics are collected, and gates computed from them.

    Attributes:
        memory: GiB for the sketches of the layers that are processed together; None: all layers.
        recompute: keep only the layers' inputs for the backward pass.
        penalty_key: identifies the base model and the penalty's text in the cache of Σp; None does not use it.
        processes: read the text together.
    """

    gate: GateSection
    memory: float | None = None
    recompute: bool = False
    penalty_key: str | None = None
    processes: Processes = ONE


def build_gates(
    model: PeftModel, proxy: Text, task: Text, settings: StatisticsSettings, clock: StageTimer
) -> dict[str, SpectralGate]:
    """Compute the gate of every adapted layer, by layer name; layers that read the same tensor share one object.

    A layer that no token reaches has no gate.

    Σp comes from the proxy text and Σt from the task's, both with the adapter switched off and without padding. Tokens
    are weighted by their gradient in the loss of the labelled tokens (`gate.covariance: fisher`), or equally where they
    predict a labelled token. If memory runs out, the text is read again in smaller batches.

    Args:
        proxy, task: batches that no evaluation uses; their labels say which tokens count.

    Raises:
        RunError: an activation or a gradient is not finite; the layer is named.
    """
    section = settings.gate
    modules = {pair.name: pair.module for pair in adapter_pairs(model)}
    model.eval()
    with adapter_off(model):
        groups = shared_inputs(model, modules, proxy[0].input_ids[:1, :8])
        columns = columns_held(section)
        needed = {group[0]: modules[group[0]].in_features * columns * BYTES / GIB for group in groups}
        shares = partition_by_memory(needed, settings.memory)
        readings = 1 + len(section.readings)
        found: dict[str, SpectralGate] = {}
        widths = [{name: modules[name].in_features for name in share} for share in shares]
        caches = [CachedPenalty(settings.penalty_key, section, each, clock) for each in widths]
        tokens = len(shares) * readings * (count_tokens(proxy) + count_tokens(task))
        tokens -= count_tokens(proxy) * sum(cached.exists for cached in caches)
        with clock.stage("statistics of both texts", tokens, "tokens") as done:
            splitter = BatchSplitter("taking statistics of", clock.warn, enabled=settings.processes.independent)
            how = section.weighted, settings.recompute
            reading = Reading(model, modules, groups, *how, done, splitter, settings.processes)
            for each, cached in zip(widths, caches, strict=True):
                found |= _gates_of(each, reading, (proxy, task), section, cached)
    torch.cuda.empty_cache()  # blocks of a text batch's size would fragment memory in training; no effect without CUDA
    if len(shares) > 1:
        clock.note(f"statistics in {len(shares)} rounds, by proxy.statistics_memory")
    by_layer = {name: found[group[0]] for group in groups if group[0] in found for name in group}
    if idle := [name for name in modules if name not in by_layer]:
        clock.note(
            f"no token of the text reaches {len(idle)} adapted layers, which have no gate and keep their random A: "
            f"{', '.join(idle)}"
        )
    return {name: by_layer[name] for name in modules if name in by_layer}


def row_penalties(
    model: PeftModel,
    gates: Mapping[str, SpectralGate],
    texts: tuple[Text, Text],
    settings: StatisticsSettings,
    clock: StageTimer,
) -> dict[str, tuple[float, float]]:
    """Return tr(A Σ Aᵀ) for the present A by layer, on the text that the gates were computed from and on held-out text.

    In units of the loss with `gate.covariance: fisher`, as a mean over the layers that share a gate. Directions were
    chosen where the first text has the least variance, so only the second number is unbiased.
    """
    pairs = adapter_pairs(model)
    first_reader = {}  # of each gate
    for pair in pairs:
        if pair.name in gates:
            first_reader.setdefault(id(gates[pair.name]), pair)
    groups = [[name for name, gate in gates.items() if id(gate) == key] for key in first_reader]
    rows = {pair.name: pair.a.detach().T for pair in first_reader.values()}
    modules = {pair.name: pair.module for pair in pairs}

    def new_sinks() -> dict[str, ProjectedCovariance]:
        return {name: ProjectedCovariance(a, device=model.device) for name, a in rows.items()}

    model.eval()
    title, tokens = "penalty of A's rows, in sample and held out", sum(map(count_tokens, texts))
    with adapter_off(model), clock.stage(title, tokens, "tokens") as done:
        splitter = BatchSplitter("taking statistics of", clock.warn, enabled=settings.processes.independent)
        how = settings.gate.weighted, settings.recompute
        reading = Reading(model, modules, groups, *how, done, splitter, settings.processes)
        draw = 0 if reading.weighted else None
        fitted, heldout = (reading.stream(text, len(rows), new_sinks, draw) for text in texts)
    return {
        name: (float(fitted[group[0]].mean().trace()), float(heldout[group[0]].mean().trace()))
        for group in groups
        if fitted[group[0]].count and heldout[group[0]].count
        for name in group
    }


def _gates_of(
    widths: Mapping[str, int], reading: Reading, texts: tuple[Text, Text], section: GateSection, cached: CachedPenalty
) -> dict[str, SpectralGate]:
    """Compute the gates of some layers' inputs: one reading for sketches, one for exact quotients, one per refinement.

    A layer that no token of one of the texts reaches, such as an idle expert, has no gate.
    """
    device = reading.model.device
    dtype = getattr(torch, section.basis_dtype_on(device.type == "cuda"))

    def new_sketches() -> dict[str, CovarianceSketch]:
        return {
            name: CovarianceSketch(width, section.rank, section.oversampling, device=device)
            for name, width in widths.items()
        }

    # Each reading draws new labels of the proxy text: those that chose a basis are not used for its Grams.
    def draws(number: int) -> tuple[int | None, None]:
        return number if reading.weighted else None, None

    def sketched(text: Text, draw: int | None) -> dict[str, LowRankCovariance]:
        sketches = reading.stream(text, len(widths), new_sketches, draw)
        return {name: sketch.covariance() for name, sketch in sketches.items() if sketch.count > 0}

    penalties, utilities = reading.processes.share(cached.load), sketched(texts[1], draws(0)[1])
    if penalties is None:
        penalties = {name: rounded(each) for name, each in sketched(texts[0], draws(0)[0]).items()}
        if reading.processes.first:
            cached.save(penalties)
    widths = {name: width for name, width in widths.items() if name in penalties and name in utilities}
    both = {name: (penalties[name], utilities[name]) for name in widths}
    bases = {name: joint_basis(*both[name]) for name in widths}
    gates: dict[str, SpectralGate] = {}
    for number, (_, with_image) in enumerate(section.readings, 1):
        # The projections of one text are freed before those of the other are made.
        projected = [
            _projected(text, reading, bases, with_image, draw) for text, draw in zip(texts, draws(number), strict=True)
        ]
        for name in widths:
            penalty, utility = (found.pop(name) for found in projected)
            of_penalty, of_utility = both[name]
            both[name] = replace(of_penalty, trace=penalty.trace), replace(of_utility, trace=utility.trace)
            gates[name] = _solved(name, section, both[name], bases[name], (penalty.gram, utility.gram))
            if penalty.image is not None and utility.image is not None:
                units = normalizers(*both[name], section.weighted)
                images = penalty.image / units[0], utility.image / units[1]
                bases[name] = refined_basis(gates[name], images, section.rank)
    if not section.readings:
        gates = {name: _solved(name, section, both[name], bases[name], None) for name in widths}
    return {name: gate.truncated(section.rank).to(device, dtype) for name, gate in gates.items()}


class Projection(NamedTuple):
    """What a text shows in a basis P: PᵀΣP, ΣP if it is wanted, and tr Σ."""

    gram: torch.Tensor
    image: torch.Tensor | None
    trace: float


def _projected(
    text: Text,
    reading: Reading,
    bases: Mapping[str, torch.Tensor],
    with_image: bool,
    draw: int | None,
) -> dict[str, Projection]:
    """Project the covariance of a text onto each basis."""
    device = reading.model.device

    def new_projections() -> dict[str, ProjectedCovariance]:
        return {name: ProjectedCovariance(basis, with_image, device=device) for name, basis in bases.items()}

    return {
        name: Projection(sink.mean(), sink.mean_image() if with_image else None, sink.energy / sink.count)
        for name, sink in reading.stream(text, len(bases), new_projections, draw).items()
    }


def _solved(
    name: str,
    section: GateSection,
    covariances: Sequence[LowRankCovariance],
    basis: torch.Tensor,
    grams: tuple[torch.Tensor, torch.Tensor] | None,
) -> SpectralGate:
    try:
        return SpectralGate.from_covariances(
            *covariances,
            ridge=section.ridge,
            utility_ridge=section.utility_ridge,
            gate_lambda=section.gate_lambda,
            floor=section.floor,
            sharpness=section.sharpness,
            basis=basis,
            grams=grams,
            one_unit=section.weighted,
        )
    except (torch.linalg.LinAlgError, ValueError) as error:
        raise RunError(
            f"the gate of {name} could not be solved for: {first_line(error)}", "raise gate.ridge, e.g. tenfold"
        ) from error


def partition_by_memory(needed: Mapping[str, float], memory: float | None) -> list[list[str]]:
    """Group layers, in order, so that the statistics of each group fit into memory; None has room for all."""
    if memory is None:
        return [list(needed)]
    shares: list[list[str]] = []
    free = 0.0
    for name, size in needed.items():
        if size > free or not shares:
            shares.append([])
            free = memory
        shares[-1].append(name)
        free -= size
    return shares


def columns_held(section: GateSection) -> int:
    """Return the most numbers held per input feature: a sketch's columns, or later a basis and its image."""
    return max([section.rank + section.oversampling, *(columns * (1 + image) for columns, image in section.readings)])
