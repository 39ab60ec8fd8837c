"""Streams text through the model and comes back with a gate for every input space that adapters read."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

import torch
from peft import PeftModel
from torch import nn

from folora_q.core import CovarianceSketch, ProjectedCovariance, SpectralGate, joint_basis
from folora_q.data.halving import Halving, ran_out, rows_of
from folora_q.data.tokens import Batch
from folora_q.errors import RunFailed, first_line
from folora_q.models.adapters import AdapterPair
from folora_q.progress import Clock
from folora_q.recipe.schema import GateSection
from folora_q.statistics.hooks import feeding, shared_inputs

Text = Sequence[Batch]
Sink = CovarianceSketch | ProjectedCovariance
GIB = 2**30
BYTES = 4  # of a number in a sketch or a basis


def build_gates(
    model: PeftModel,
    pairs: Sequence[AdapterPair],
    proxy: Text,
    task: Text,
    section: GateSection,
    clock: Clock,
    memory: float | None = None,
) -> dict[str, SpectralGate]:
    """The gate of every adapted layer, by the layer's name; layers that read the same tensor share one object.

    Σp comes from the proxy text and Σt from the task's, both with the adapter switched off, of the tokens from which a
    token that counts is predicted: no padding, and of the task not the prompts, which it shares from row to row. Where
    memory runs out, the text is read again in smaller batches.

    Args:
        proxy, task: batches that no evaluation uses; their labels say what counts.
        memory: GiB for the sketches of layers at a time; None takes all at once.

    Raises:
        RunFailed: an activation is not finite, or a layer is given no token; the layer is named.
    """
    modules = {pair.name: pair.module for pair in pairs}
    model.eval()
    with torch.no_grad(), model.disable_adapter():
        groups = shared_inputs(model, modules, proxy[0].input_ids[:1, :8])
        shares = _shares([group[0] for group in groups], modules, section, memory)
        passes = 2 if section.second_pass else 1
        found: dict[str, SpectralGate] = {}
        with clock.stage("statistics of both texts", len(shares) * passes * (len(proxy) + len(task))) as done:
            reading = _Reading(model, proxy, task, section, done, Halving("taking statistics of", clock.note))
            for share in shares:
                found |= _gates_of({name: modules[name] for name in share}, reading)
    torch.cuda.empty_cache()  # blocks as large as a batch of text would split badly in training; nothing without CUDA
    if len(shares) > 1:
        clock.note(f"statistics in {len(shares)} rounds, by proxy.statistics_memory")
    by_layer = {name: found[group[0]] for group in groups for name in group}
    return {name: by_layer[name] for name in modules}


@dataclass(frozen=True)
class _Reading:
    """What is read, and how."""

    model: PeftModel
    proxy: Text
    task: Text
    section: GateSection
    on_progress: Callable[[int], None]
    halving: Halving

    def stream(
        self, text: Text, readers: dict[str, nn.Module], new_sinks: Callable[[], dict[str, Sink]]
    ) -> dict[str, Sink]:
        """Sinks that have seen a text. If memory runs out they have seen a part, and it begins again with new ones."""
        while True:
            sinks: dict[str, Sink] = {}
            try:
                sinks = new_sinks()
                self._feed(text, readers, sinks)
                return sinks
            except RuntimeError as error:
                if not ran_out(error):
                    raise
            if not sinks:
                raise RunFailed(
                    f"memory ran out for the sketches of {len(readers)} layers' inputs",
                    "set proxy.statistics_memory, e.g. to 0.2 (GiB), or lower gate.rank",
                )
            del sinks
            self.halving.halve(self.halving.fitting(len(text[0].input_ids)), text[0].input_ids.shape[1])

    def _feed(self, text: Text, readers: dict[str, nn.Module], sinks: dict[str, Sink]) -> None:
        with feeding(readers, sinks) as mask:
            for batch in text:
                rows = len(batch.input_ids)
                for start in range(0, rows, size := self.halving.fitting(rows)):
                    part = rows_of(batch, start, start + size)
                    mask[0] = part.predicting
                    self.model(
                        input_ids=part.input_ids, attention_mask=part.attention_mask, use_cache=False, logits_to_keep=1
                    )
                self.on_progress(1)


def _gates_of(readers: dict[str, nn.Module], reading: _Reading) -> dict[str, SpectralGate]:
    """The gates of some layers, from one or two readings of both texts."""
    section, device = reading.section, reading.model.device
    dtype = getattr(torch, section.basis_dtype_on(device.type == "cuda"))

    def new_sketches() -> dict[str, Sink]:
        widths = {name: module.in_features for name, module in readers.items()}
        return {
            name: CovarianceSketch(width, section.rank, section.oversampling, device=device)
            for name, width in widths.items()
        }

    penalty, utility = (
        {name: sketch.covariance() for name, sketch in reading.stream(text, readers, new_sketches).items()}
        for text in (reading.proxy, reading.task)
    )
    grams: list[dict[str, torch.Tensor]] = []
    if section.second_pass:
        bases = {name: joint_basis(penalty[name], utility[name]) for name in readers}

        def new_projections() -> dict[str, Sink]:
            return {name: ProjectedCovariance(basis, device=device) for name, basis in bases.items()}

        # One text's projections are gone before the other's are made.
        grams = [
            {name: projection.mean() for name, projection in reading.stream(text, readers, new_projections).items()}
            for text in (reading.proxy, reading.task)
        ]
    found: dict[str, SpectralGate] = {}
    for name in readers:
        try:
            gate = SpectralGate.from_covariances(
                penalty[name],
                utility[name],
                ridge=section.ridge,
                utility_ridge=section.utility_ridge,
                gate_lambda=section.gate_lambda,
                floor=section.floor,
                sharpness=section.sharpness,
                grams=tuple(gram[name] for gram in grams) or None,
            )
        except (torch.linalg.LinAlgError, ValueError) as error:
            raise RunFailed(
                f"the gate of {name} could not be solved for: {first_line(error)}", "raise gate.ridge, e.g. tenfold"
            ) from error
        found[name] = gate.to(device, dtype)
    return found


def _shares(
    names: Sequence[str], modules: Mapping[str, nn.Module], section: GateSection, memory: float | None
) -> list[list[str]]:
    """Layers whose sketches stand in memory together."""
    if memory is None:
        return [list(names)]
    shares: list[list[str]] = []
    free = 0.0
    for name in names:
        needed = modules[name].in_features * columns_held(section) * BYTES / GIB
        if needed > free or not shares:
            shares.append([])
            free = memory
        shares[-1].append(name)
        free -= needed
    return shares


def columns_held(section: GateSection) -> int:
    """Numbers held for each input feature: a sketch's columns, or in a second reading the joint basis."""
    return max(section.rank + section.oversampling, 2 * section.rank if section.second_pass else 0)
