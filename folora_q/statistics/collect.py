"""Streams text through the model and comes back with a gate for every input space that adapters read."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
from peft import PeftModel

from folora_q.core import CovarianceSketch, LowRankCovariance, ProjectedCovariance, SpectralGate, joint_basis
from folora_q.data.tokens import Batch
from folora_q.models.adapters import AdapterPair
from folora_q.recipe.schema import GateSection
from folora_q.statistics.hooks import TokenSink, feeding, shared_inputs

Text = Sequence[Batch]


def build_gates(
    model: PeftModel,
    pairs: Sequence[AdapterPair],
    proxy: Text,
    task: Text,
    section: GateSection,
    on_progress: Callable[[int], None] = lambda batches: None,
) -> dict[str, SpectralGate]:
    """The gate of every adapted layer, by the layer's name; layers that read the same tensor share one object.

    Σp comes from the proxy text and Σt from the task's, both with the adapter switched off and padding left out.

    Args:
        proxy, task: batches that no evaluation uses.
        on_progress: called with 1 after each of `statistics_passes(section)` x (len(proxy) + len(task)) batches.

    Raises:
        RunFailed: an activation is not finite, or a layer is given no token; the layer is named.
    """
    modules = {pair.name: pair.module for pair in pairs}
    device = pairs[0].a.device
    model.eval()
    with torch.no_grad(), model.disable_adapter():
        groups = shared_inputs(model, modules, proxy[0].input_ids[:1, :8])
        readers = {group[0]: modules[group[0]] for group in groups}

        def stream(text: Text, sinks: dict[str, TokenSink]) -> None:
            with feeding(readers, sinks) as mask:
                for batch in text:
                    mask[0] = batch.attention_mask
                    model(
                        input_ids=batch.input_ids,
                        attention_mask=batch.attention_mask,
                        use_cache=False,
                        logits_to_keep=1,
                    )
                    on_progress(1)

        def covariances(text: Text) -> dict[str, LowRankCovariance]:
            sketches = {
                name: CovarianceSketch(module.in_features, section.rank, section.oversampling, device=device)
                for name, module in readers.items()
            }
            stream(text, sketches)
            return {name: sketch.covariance() for name, sketch in sketches.items()}

        penalty, utility = covariances(proxy), covariances(task)
        grams: dict[str, list[torch.Tensor]] = {name: [] for name in readers}
        if section.second_pass:
            for text in (proxy, task):
                exact = {
                    name: ProjectedCovariance(joint_basis(penalty[name], utility[name]), device=device)
                    for name in readers
                }
                stream(text, exact)
                for name, projection in exact.items():
                    grams[name].append(projection.mean())

    gates: dict[str, SpectralGate] = {}
    for group in groups:
        first = group[0]
        gate = SpectralGate.from_covariances(
            penalty[first],
            utility[first],
            ridge=section.ridge,
            utility_ridge=section.utility_ridge,
            gate_lambda=section.gate_lambda,
            floor=section.floor,
            sharpness=section.sharpness,
            grams=tuple(grams[first]) or None,
        ).to(device, basis_dtype(section, device))
        gates.update(dict.fromkeys(group, gate))
    return {name: gates[name] for name in modules}


def basis_dtype(section: GateSection, device: torch.device) -> torch.dtype:
    """Of the gates' bases: three digits are enough to gate a step, and on a GPU they stay beside the model."""
    if section.basis_dtype == "auto":
        return torch.bfloat16 if device.type == "cuda" else torch.float32
    return getattr(torch, section.basis_dtype)


def statistics_passes(section: GateSection) -> int:
    """How often the text is read."""
    return 2 if section.second_pass else 1
