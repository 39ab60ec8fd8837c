"""DPO: the loss, the steps and the adapter are those of TRL's DPOTrainer; what differs is that batches can be cut."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from folora_q.data.pairs import padded_pairs
from folora_q.data.tokens import IGNORED
from folora_q.models.adapters import adapter_pairs
from folora_q.models.hardware import Hardware
from folora_q.recipe import load_recipe
from folora_q.training import objectives
from folora_q.workflows.calibration import task_text
from tests.conftest import run_out_of_memory_over
from tests.training.reference import (
    PLAIN,
    STEPS,
    Losses,
    adapter,
    apart,
    held_out_metrics,
    loss_of,
    ours,
    set_b,
    squared_gradients,
    statistics,
    tokens,
    trls,
)

DPO = ["training.objective=dpo", *PLAIN]


def test_losses_and_adapter_are_those_of_trls_trainer(pairs_file: Path, tmp_path: Path) -> None:
    recipe = load_recipe(pairs_file, DPO)
    mine, theirs = Losses(), Losses()
    trainer, reference = ours(recipe, mine), trls(recipe, tmp_path / "trl", theirs)
    start = adapter(trainer)
    assert apart(start, adapter(reference)) == 0
    trainer.train()
    reference.train()
    assert len(mine.seen) == STEPS and mine.seen[-1] < 0.9 * mine.seen[0], "something was learned"
    assert mine.seen == pytest.approx(theirs.seen, abs=1e-6)
    assert apart(adapter(trainer), start) > 1e-2 and apart(adapter(trainer), adapter(reference)) < 2e-5


def test_a_step_is_the_same_however_its_batch_is_cut(pairs_file: Path) -> None:
    at_once = ours(load_recipe(pairs_file, DPO))
    at_once.train()
    cut = [*DPO, "training.per_device_train_batch_size=1", "training.gradient_accumulation_steps=4"]
    by_one = ours(load_recipe(pairs_file, cut))
    by_one.train()
    split = ours(load_recipe(pairs_file, DPO))
    rows: list[int] = []
    split.model.get_base_model().register_forward_pre_hook(run_out_of_memory_over(4, rows), with_kwargs=True)
    split.train()
    assert max(rows) == 8 and set(rows[3:]) == {4}, "two sequences of each pair, four pairs at first and then two"
    for other in (by_one, split):
        assert apart(adapter(at_once), adapter(other)) < 2e-5


def test_a_pair_without_labels_fills_a_batch_and_counts_nothing(pairs_file: Path) -> None:
    trainer = ours(load_recipe(pairs_file, DPO))
    inputs = padded_pairs([trainer.train_dataset[i] for i in range(3)])
    inputs["labels"][2] = IGNORED
    assert trainer.objective.count(inputs) == 2
    set_b(trainer)
    without = {name: value[:2] for name, value in inputs.items()}
    assert loss_of(trainer, [inputs], 2) == pytest.approx(loss_of(trainer, [without], 2), abs=1e-6)


def test_held_out_loss_accuracy_and_margin_are_those_of_trls_metrics(pairs_file: Path, tmp_path: Path) -> None:
    recipe = load_recipe(pairs_file, DPO)
    trainer, reference = ours(recipe), trls(recipe, tmp_path / "trl")
    measured, metrics = held_out_metrics(trainer, reference)
    assert measured["loss"] == pytest.approx(metrics["loss"], abs=1e-5)
    assert measured["reward_margin"] == pytest.approx(metrics["rewards/margins"], abs=1e-5)
    assert measured["reward_accuracy"] == pytest.approx(metrics["rewards/accuracies"], abs=1e-6)
    assert abs(measured["reward_margin"]) > 1e-3


def test_statistics_are_weighted_by_the_gradient_of_trls_loss(pairs_file: Path, tmp_path: Path) -> None:
    recipe = load_recipe(pairs_file, DPO)
    reference = trls(recipe, tmp_path / "trl")
    pair = adapter_pairs(reference.model)[2]
    expected = squared_gradients(reference, pair, 5)
    rows = tokens(recipe, reference.processing_class).select(range(5))
    found = statistics(reference.model, pair, task_text(rows[:], recipe.training, 4, reference.model.device))
    assert float((found - expected).norm() / expected.norm()) < 1e-4


def test_trls_fused_head_as_on_a_gpu_gives_the_same_loss(pairs_file: Path, monkeypatch) -> None:
    trainer = ours(load_recipe(pairs_file, DPO))
    set_b(trainer)
    inputs = padded_pairs([trainer.train_dataset[i] for i in range(4)])
    by_logits = loss_of(trainer, [inputs], 4)
    monkeypatch.setattr(objectives, "_head_is_fused", lambda trainer: True)
    assert loss_of(trainer, [inputs], 4) == pytest.approx(by_logits, abs=1e-5) and abs(by_logits - 0.6931) > 1e-3


def test_in_bfloat16_model_and_base_are_rounded_alike(pairs_file: Path) -> None:
    losses = Losses()
    recipe = load_recipe(pairs_file, [*DPO, "model.dtype=bfloat16", "training.max_steps=3"])
    trainer = ours(recipe, losses, Hardware(torch.device("cpu"), torch.bfloat16, "a test"))
    trainer.train()
    assert losses.seen[0] == pytest.approx(0.693147, abs=1e-6) and losses.seen[2] < 0.69
