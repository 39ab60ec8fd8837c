"""The base's hidden states, remembered for texts that are read repeatedly."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from folora_q.data.tokens import batches
from folora_q.evaluation.divergence import HeldOutText, compare
from folora_q.evaluation.model_pair import ModelPair
from folora_q.models.adapters import adapter_pairs, attach_adapter
from folora_q.models.hardware import Hardware
from folora_q.models.load import load_model
from folora_q.recipe.adapter import AdapterSection
from folora_q.recipe.schema import ModelSection
from folora_q.runs.results import TextKind

CPU = torch.device("cpu")


def test_the_base_reads_a_text_once_and_the_results_are_the_same(
    tiny_folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    base = load_model(ModelSection(model_name_or_path=str(tiny_folder)), Hardware(CPU, torch.float32, "a test"))
    model = attach_adapter(base, AdapterSection(r=4), seed=0)
    generator = torch.Generator().manual_seed(0)
    rows = [torch.randint(3, 250, (9 + 3 * i,), generator=generator).tolist() for i in range(6)]
    text = HeldOutText("text", TextKind.GENERATED, list(batches(rows, 2, CPU)))
    reads: list[int] = []
    read = ModelPair._base_states
    monkeypatch.setattr(ModelPair, "_base_states", lambda pair, batch: (reads.append(1), read(pair, batch))[1])
    remembering = ModelPair(model, remember=True)
    for std in (0.1, 0.2):  # as the adapter changes during training
        for pair in adapter_pairs(model):
            torch.nn.init.normal_(pair.b, std=std, generator=torch.Generator().manual_seed(1))
        found = compare(remembering, text)
        seen = len(reads)
        assert found == compare(ModelPair(model), text) and found.kl.value > 0
        assert len(reads) == seen + 3
        reads.clear()
        assert seen == (3 if std == 0.1 else 0)
