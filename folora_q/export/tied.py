"""Input embeddings and output layer that a base ties, where an adapter changes one of them: they part, as in PEFT."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

import torch

from folora_q.export.adapter import AdapterFile
from folora_q.models.checkpoint import Checkpoint
from folora_q.models.layout import read_layout
from folora_q.models.trust import NOTHING, Trust


def part_tied(
    base: Checkpoint, adapters: Sequence[AdapterFile], trust: Trust = NOTHING
) -> tuple[Checkpoint, list[AdapterFile]]:
    """The base with a weight of its own for each that must part, and the adapters on it.

    What the model's class ties counts, whether config.json says so or not. Where an adapter was trained with both as
    one (PEFT's `ensure_weight_tying`), they stay so, and it is left with one of them.
    """
    adapters = list(adapters)
    changed = {name for adapter in adapters for name in (*adapter.deltas, *adapter.replaced)}
    layout = read_layout(base.folder, base.tensors, changed, trust)
    for one, source in layout.tied.items():
        if not changed & {one, source} or layout.stored_as(one) or len(layout.stored_as(source)) != 1:
            continue  # of two on the disk transformers ties those that are equal, and after the merge they differ
        if all(_as_one(adapter, one, source) for adapter in adapters):
            kept = [{name: whole for name, whole in each.replaced.items() if name != one} for each in adapters]
            adapters = [replace(each, replaced=whole) for each, whole in zip(adapters, kept, strict=True)]
        else:
            base = base.with_copy(one, layout.stored_as(source)[0])
    return base, adapters


def _as_one(adapter: AdapterFile, one: str, other: str) -> bool:
    """Whether an adapter makes the same of both."""
    whole = adapter.replaced
    if {one, other} & adapter.deltas.keys() or not {one, other} <= whole.keys():
        return False
    return torch.equal(whole[one], whole[other])
