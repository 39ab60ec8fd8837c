"""KTO: loss, steps and adapter are those of TRL's KTOTrainer; what differs is that a step can be cut."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from datasets import Dataset
from torch.utils.data import SequentialSampler
from transformers import TrainerCallback

from folora_q.data.pairs import padded_pairs
from folora_q.data.tokens import IGNORED
from folora_q.models.adapters import adapter_pairs
from folora_q.models.hardware import Hardware
from folora_q.recipe import Recipe, load_recipe
from folora_q.training import objectives
from folora_q.training.trainer import GatedTrainer
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

# Of weights that move by more than 1e-2, between two orders of summation: Adam divides by small gradients.
ROUNDING = 1e-4
KTO = [
    *("training.objective=kto", *PLAIN, "training.desirable_weight=0.7", "training.undesirable_weight=1.3"),
    *("training.per_device_train_batch_size=4", "training.gradient_accumulation_steps=1"),
]


def with_our_mismatched(recipe: Recipe, folder: Path, callback: TrainerCallback | None = None) -> Any:
    """TRL's trainer with our mismatched completions; its own are those of the row before in a batch."""
    weights = {name: getattr(recipe.training, name) for name in ("desirable_weight", "undesirable_weight")}
    trainer = trls(recipe, folder, callback, **weights)
    theirs: list[dict[str, Any]] = list(trainer.train_dataset)
    for row, mine in zip(theirs, tokens(recipe, trainer.processing_class), strict=True):
        assert row["prompt_ids"] + row["completion_ids"] == mine["input_ids"] and row["label"] == mine["desirable"]
        prompt = len(row["prompt_ids"])
        assert mine["mismatched_ids"][:prompt] == row["prompt_ids"]
        row["KL_completion_ids"] = mine["mismatched_ids"][prompt:]
    trainer.train_dataset = Dataset.from_list(theirs)
    return trainer


def in_sequence(trainer: GatedTrainer) -> GatedTrainer:
    """Let a trainer read its rows in their order, as TRL's does."""
    trainer._get_train_sampler = lambda dataset=None: SequentialSampler(trainer.train_dataset)  # type: ignore[method-assign]
    return trainer


def test_losses_and_adapter_are_those_of_trls_trainer(labelled_file: Path, tmp_path: Path) -> None:
    recipe = load_recipe(labelled_file, KTO)
    mine, theirs = Losses(), Losses()
    trainer, reference = in_sequence(ours(recipe, mine)), with_our_mismatched(recipe, tmp_path / "trl", theirs)
    start = adapter(trainer)
    assert apart(start, adapter(reference)) == 0
    trainer.train()
    reference.train()
    assert len(mine.seen) == STEPS and mine.seen[-1] < 0.9 * mine.seen[0], "something was learned"
    assert max(line["kl"] for line in theirs.logs) > 0.1, "z is above its limit in some step"
    assert mine.seen == pytest.approx(theirs.seen, abs=1e-6)
    assert apart(adapter(trainer), start) > 1e-2 and apart(adapter(trainer), adapter(reference)) < 5e-5


def test_a_step_is_the_same_however_its_batch_is_cut(labelled_file: Path) -> None:
    at_once, by_one = Losses(), Losses()
    trainer = ours(load_recipe(labelled_file, KTO), at_once)
    start = adapter(trainer)
    trainer.train()
    cut = [*KTO, "training.per_device_train_batch_size=1", "training.gradient_accumulation_steps=4"]
    others = [ours(load_recipe(labelled_file, cut), by_one), ours(load_recipe(labelled_file, KTO))]
    rows: list[int] = []
    others[1].model.get_base_model().register_forward_pre_hook(run_out_of_memory_over(2, rows), with_kwargs=True)
    for other in others:
        other.train()
        assert apart(adapter(trainer), adapter(other)) < ROUNDING
    assert max(rows) == 4 and set(rows[1:]) == {2}, "the first pass, for z, shows what fits"
    assert by_one.seen == pytest.approx(at_once.seen, abs=1e-5)
    assert apart(adapter(trainer), start) > 1e-2


def test_z_is_a_mean_over_the_step_without_rows_that_fill_a_batch(labelled_file: Path) -> None:
    trainer = ours(load_recipe(labelled_file, KTO))
    set_b(trainer)
    inputs = padded_pairs([trainer.train_dataset[i] for i in range(5)])
    inputs["labels"][4] = IGNORED
    assert trainer.objective.count(inputs) == 4
    parts = [{name: value[start:stop] for name, value in inputs.items()} for start, stop in ((0, 1), (1, 4), (4, 5))]
    at_once = loss_of(trainer, [inputs], 4)
    assert loss_of(trainer, parts, 4) == pytest.approx(at_once, abs=1e-6)
    assert loss_of(trainer, parts[:2], 4) == pytest.approx(at_once, abs=1e-6)


def test_trls_fused_head_as_on_a_gpu_gives_the_same_loss(labelled_file: Path, monkeypatch) -> None:
    trainer = ours(load_recipe(labelled_file, KTO))
    set_b(trainer)
    inputs = padded_pairs([trainer.train_dataset[i] for i in range(4)])
    by_logits = loss_of(trainer, [inputs], 4)
    monkeypatch.setattr(objectives, "_head_is_fused", lambda trainer: True)
    assert loss_of(trainer, [inputs], 4) == pytest.approx(by_logits, abs=1e-5)


def test_held_out_numbers_are_those_of_trls_metrics(labelled_file: Path, tmp_path: Path) -> None:
    recipe = load_recipe(labelled_file, KTO)
    trainer, reference = ours(recipe), with_our_mismatched(recipe, tmp_path / "trl")
    measured, metrics = held_out_metrics(trainer, reference)
    assert measured["loss"] == pytest.approx(metrics["loss"], abs=1e-5)
    assert measured["reward_margin"] == pytest.approx(metrics["rewards/margins"], abs=1e-5)
    assert measured["reward_reference"] == pytest.approx(recipe.training.beta * metrics["kl"], abs=1e-5)
    assert 0 < measured["reward_accuracy"] < 1 and abs(measured["reward_margin"]) > 1e-3


def test_statistics_are_weighted_by_the_gradient_of_trls_loss(labelled_file: Path, tmp_path: Path) -> None:
    recipe = load_recipe(labelled_file, KTO)
    reference = with_our_mismatched(recipe, tmp_path / "trl")
    pair = adapter_pairs(reference.model)[2]
    expected = squared_gradients(reference, pair, 5)
    rows = tokens(recipe, reference.processing_class).select(range(5))
    text = task_text(rows[:], recipe.training, 4, reference.model.device)
    assert len({batch.slope for batch in text}) == 2, "of both labels"
    found = statistics(reference.model, pair, text)
    assert float((found - expected).norm() / expected.norm()) < 1e-4


def test_in_bfloat16_model_and_base_are_rounded_alike(labelled_file: Path) -> None:
    losses = Losses()
    recipe = load_recipe(labelled_file, [*KTO, "model.dtype=bfloat16", "training.max_steps=3"])
    trainer = ours(recipe, losses, Hardware(torch.device("cpu"), torch.bfloat16, "a test"))
    trainer.train()
    at_the_start = [0.5 * (0.7 * good + 1.3 * (4 - good)) / 4 for good in range(5)]
    assert min(abs(losses.seen[0] - loss) for loss in at_the_start) < 1e-6 and losses.seen[2] < losses.seen[0]
