"""Several processes that share one base (FSDP2) compute the run of one process."""

from __future__ import annotations

import os
import re
import signal
from dataclasses import replace
from pathlib import Path
from typing import Any
from unittest.mock import patch

import pytest
import torch
from peft import PeftModel
from torch.distributed.tensor import DTensor

from folora_q.distributed.processes import ONE, Processes, start_processes
from folora_q.models.adapters import AdapterPair, adapter_pairs, attach_adapter
from folora_q.models.hardware import Hardware
from folora_q.models.load import load_model
from folora_q.recipe.adapter import AdapterSection
from folora_q.recipe.schema import ModelSection
from folora_q.training.trainer import GatedTrainer
from tests.distributed.together import together
from tests.distributed.train_test import (
    assert_the_same,
    evaluated,
    in_step,
    kept,
    measurements,
    one,
    outcome,
    several,
)
from tests.zoo.members import MEMBERS

CPU = Hardware(torch.device("cpu"), torch.float32, "a test")
SHARD = "model.fsdp=shard"


@pytest.mark.parametrize(
    "settings",
    [
        ["gate.rule=frozen", SHARD, "training.activation_checkpointing=true"],
        ["gate.rule=frozen", "model.fsdp=offload"],
        ["gate.enabled=false", SHARD, "training.kernels=none"],
    ],
    ids=lambda settings: " ".join(settings),
)
def test_a_sharded_base_trains_as_a_complete_one(recipe_file: Path, tmp_path: Path, settings: list[str]) -> None:
    alone = [each for each in settings if "fsdp" not in each]
    one(recipe_file, tmp_path / "one", *alone, "evaluation.steps=10")
    printed = several(2, recipe_file, tmp_path / "two", *settings, "evaluation.steps=10")
    assert "each process has a part of the base" in printed
    assert_the_same(tmp_path / "one", tmp_path / "two")
    measured, found = (measurements(tmp_path / name) for name in ("one", "two"))
    assert len(found) >= 2 and found == [pytest.approx(each, rel=1e-3, abs=1e-5) for each in measured]
    for text, other in zip(*(evaluated(tmp_path / name) for name in ("one", "two")), strict=True):
        assert other["tokens"] == text["tokens"]
        assert other["kl"]["value"] == pytest.approx(text["kl"]["value"], rel=1e-3, abs=1e-6)
    answers = [(tmp_path / name / "answers.jsonl").read_text() for name in ("one", "two")]
    assert answers[0] == answers[1]


def gradient(pair: AdapterPair) -> torch.Tensor:
    assert pair.b.grad is not None
    return pair.b.grad


@pytest.mark.parametrize("name", ["mistral", "qwen3-moe", "gemma3", "granite4-hybrid", "gpt-neox", "fp4-skipped"])
def test_each_process_holds_a_part_and_computes_the_complete_model(tmp_path: Path, name: str) -> None:
    section = ModelSection(model_name_or_path=str(MEMBERS[name].save(tmp_path / "model")))

    def computed(section: ModelSection, processes: Processes) -> tuple[PeftModel, list[torch.Tensor]]:
        """Logits, and gradients of B."""
        hardware = replace(CPU, device=processes.device)
        model = attach_adapter(load_model(section, hardware, processes=processes), AdapterSection(), seed=0)
        ids = torch.arange(3, 15, device=processes.device)[None]
        output = model(input_ids=ids, labels=ids)
        output.loss.backward()
        return model, [output.logits.detach().cpu(), *(gradient(pair).cpu() for pair in adapter_pairs(model))]

    with patch("folora_q.models.load.hold_decoded"):  # it computes checkpoints in 4 bits more precisely
        whole, expected = computed(section, ONE)
    size = sum(p.nbytes for key, p in whole.named_parameters() if re.search(r"layers\.\d", key) and "lora_" not in key)

    def act(rank: int) -> tuple[float, float]:
        processes = replace(start_processes(2), sharded=True)
        model, found = computed(section.model_copy(update={"fsdp": "shard"}), processes)
        differences = [float((one - other).abs().max()) for one, other in zip(found, expected, strict=True)]
        parts = [p.to_local() for p in model.parameters() if isinstance(p, DTensor)]
        return max(differences), sum(part.nbytes for part in parts) / size

    for difference, share in together(2, act):
        assert difference < 1e-5
        assert share == pytest.approx(0.5, abs=0.02)


def test_a_signal_stops_all_after_the_step_and_the_run_resumes_exactly(recipe_file: Path, tmp_path: Path) -> None:
    several(2, recipe_file, tmp_path / "whole", SHARD)

    def before(rank: int) -> None:
        if rank == 1:
            in_step(3, lambda trainer: os.kill(os.getpid(), signal.SIGTERM))

    folder = tmp_path / "stopped"
    codes, texts = outcome(2, recipe_file, folder, SHARD, before=before)
    assert codes == [143, 143], texts
    several(2, recipe_file, folder, SHARD, "--resume")
    name = "adapter/adapter_model.safetensors"
    assert (folder / name).read_bytes() == (tmp_path / "whole" / name).read_bytes()


def test_memory_that_runs_out_in_one_process_ends_all(recipe_file: Path, tmp_path: Path) -> None:
    """The others are in the middle of a layer that all gather: none could compute it again with fewer rows."""

    def before(rank: int) -> None:
        compute = GatedTrainer.compute_loss

        def failing(self: GatedTrainer, *args: Any, **kwargs: Any) -> Any:
            if rank == 1:
                raise RuntimeError("CUDA out of memory. Tried to allocate 20.00 MiB")
            return compute(self, *args, **kwargs)

        GatedTrainer.compute_loss = failing

    codes, texts = outcome(2, recipe_file, tmp_path / "two", SHARD, before=before)
    assert codes == [1, 1]
    assert "another process of this run has ended" in texts[0]
    assert "memory ran out while training on" in texts[1]


@pytest.mark.parametrize(
    ("count", "settings", "says"),
    [
        (1, [SHARD], "model.fsdp: shard shards the base over several processes, and this is one"),
        (2, [SHARD, "training.kernels=compile"], "training.kernels: compile needs a complete base"),
    ],
)
def test_what_cannot_be_sharded_is_refused(
    recipe_file: Path, tmp_path: Path, count: int, settings: list[str], says: str
) -> None:
    codes, texts = outcome(count, recipe_file, tmp_path / "run", *settings)
    assert codes[0] == 2 and says in " ".join(texts[0].split()), texts


def test_a_sharded_base_writes_the_same_texts_and_answers_as_a_complete_one(
    recipe_file: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    keep = ["keep=[arithmetic]", "keep.max_new_tokens=2", "gate.rule=frozen"]
    one(recipe_file, tmp_path / "one", *keep)
    monkeypatch.setenv("FOLORA_Q_CACHE", str(tmp_path / "another"))  # all processes sample and answer together
    several(2, recipe_file, tmp_path / "two", *keep, SHARD)
    assert_the_same(tmp_path / "one", tmp_path / "two")
    for name in ("proxy.jsonl", "keep.jsonl"):
        assert (tmp_path / "two" / name).read_bytes() == (tmp_path / "one" / name).read_bytes()
    [alone], [together_kept] = kept(tmp_path / "one"), kept(tmp_path / "two")
    assert together_kept["kl"]["value"] == pytest.approx(alone["kl"]["value"], rel=1e-3)
