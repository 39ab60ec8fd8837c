"""A run on a card cuts its steps by the card's memory; what it learns, and its recipe on disk, stay the same."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from folora_q.errors import UserError
from folora_q.memory.estimate import GIB
from folora_q.models.hardware import Hardware
from folora_q.models.load import LoadedModel, load_model
from folora_q.recipe import load_recipe
from folora_q.recipe.schema import ModelSection
from folora_q.runs.folder import RunFolder
from folora_q.workflows import step_plan
from folora_q.workflows.prepare_training import TrainingRequest
from folora_q.workflows.step_plan import plan_on
from folora_q.workflows.train import run_training
from tests.conftest import Silent

CPU = Hardware(torch.device("cpu"), torch.float32, "a test")
BATCH = ["training.per_device_train_batch_size=1", "training.gradient_accumulation_steps=4"]


@pytest.fixture
def card(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(step_plan, "available_memory", lambda _: 80 * GIB)


@pytest.fixture
def base(tiny_folder: Path) -> LoadedModel:
    return load_model(ModelSection(model_name_or_path=str(tiny_folder)), CPU)


def test_a_cpu_follows_the_recipe(recipe_file: Path, base: LoadedModel) -> None:
    assert plan_on(CPU, load_recipe(recipe_file), base.model.config) is None


def test_the_plan_is_made_for_the_loaded_model(recipe_file: Path, base: LoadedModel, card: None) -> None:
    plan = plan_on(CPU, load_recipe(recipe_file, BATCH), base.model.config)
    assert plan is not None and (plan.rows, plan.passes, plan.recompute) == (4, 1, False)
    quantized = sum(p.numel() for name, p in base.model.named_parameters() if name.endswith("proj.weight"))
    assert plan.memory.stages[0].device["4-bit weights"] == quantized  # packed, two weights to a byte


def test_a_planned_run_learns_the_same(recipe_file: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    runs = {}
    for name, memory in (("as-written", None), ("planned", 80 * GIB)):
        monkeypatch.setattr(step_plan, "available_memory", lambda _, memory=memory: memory)
        recipe = load_recipe(recipe_file, [*BATCH, f"training.output_dir={tmp_path / name}"])
        progress = Silent()
        result = run_training(TrainingRequest(recipe=recipe), progress)
        runs[name] = load_file(result.folder / "adapter" / "adapter_model.safetensors")
        said = [note for note in progress.notes if "4 sequences at a time, without activation checkpointing" in note]
        assert len(said) == (memory is not None)
        assert "gradient_accumulation_steps: 4" in RunFolder(result.folder).recipe.read_text("utf-8")
    for name, weight in runs["as-written"].items():
        assert torch.allclose(runs["planned"][name], weight, rtol=1e-3, atol=1e-5), name


def test_a_model_that_cannot_be_built_without_weights_is_trained_as_the_recipe_says(
    recipe_file: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def fails(*_: object) -> None:
        raise UserError("transformers knows no model of the type mine")

    monkeypatch.setattr("folora_q.workflows.run_inputs.plan_on", fails)
    progress = Silent()
    run_training(TrainingRequest(recipe=load_recipe(recipe_file)), progress)
    assert "the batch is computed as the recipe says: transformers knows no model of the type mine" in progress.notes
