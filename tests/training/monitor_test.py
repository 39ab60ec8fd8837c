"""The numbers that are shown in training are those of the trainer, and showing them changes nothing."""

from __future__ import annotations

import math
from pathlib import Path

import pytest
import torch

from folora_q.models.adapters import adapter_pairs
from folora_q.models.hardware import used_memory
from folora_q.progress import Measurement, TrainingEvent, TrainingStatus
from folora_q.recipe import load_recipe
from folora_q.training.callbacks import Reporting
from folora_q.training.monitor import Monitor, Pace, SmoothedLoss
from tests.training.trainer_test import CPU, trainer_of


def watched(recipe_file: Path, overrides: list[str]) -> tuple[list[TrainingEvent], list[dict], list[torch.Tensor]]:
    """Train with a monitor: what it showed, the lines of metrics, and every A and B in the end."""
    events: list[TrainingEvent] = []
    lines: list[dict] = []
    trainer = trainer_of(load_recipe(recipe_file, overrides), [Reporting(lambda n: None, lines.append)])
    monitor = Monitor(events.append, lambda: trainer.reading, lambda: used_memory(CPU.device))
    trainer.add_callback(monitor)
    trainer.train()
    return events, lines, [p.detach().clone() for pair in adapter_pairs(trainer.model) for p in (pair.a, pair.b)]


def test_every_step_has_the_trainers_numbers(recipe_file: Path) -> None:
    events, lines, _ = watched(recipe_file, ["logging.logging_steps=1", "training.gradient_accumulation_steps=2"])
    statuses = [event for event in events if isinstance(event, TrainingStatus)]
    steps = [status for status in statuses if status.logged_loss is None]
    logged = [status for status in statuses if status.logged_loss is not None]
    assert [status.step for status in steps] == [status.step for status in logged] == [1, 2, 3, 4, 5]
    metrics = [line for line in lines if "loss" in line]
    for status, line in zip(logged, metrics, strict=True):
        assert status.logged_loss == line["loss"] and status.learning_rate == line["learning_rate"]
        assert status.grad_norm == pytest.approx(line["grad_norm"], rel=1e-6)
    mean = SmoothedLoss()
    for status, line in zip(steps, metrics, strict=True):
        mean.add(line["loss"])
        assert status.loss == pytest.approx(mean.value, rel=1e-5)
        assert status.steps == 5 and 0 < status.memory.used < status.memory.total
    assert steps[0].remaining is None and steps[0].tokens_per_second is None, "the first step includes setup"
    assert all(status.remaining > 0 and status.tokens_per_second > 0 for status in steps[1:4])
    assert steps[4].remaining == 0 and not any(isinstance(event, Measurement) for event in events)


def test_a_steps_tokens_are_those_of_all_its_batches_without_padding(recipe_file: Path) -> None:
    trainer = trainer_of(load_recipe(recipe_file, ["training.gradient_accumulation_steps=3", "training.max_steps=1"]))
    trainer.train()
    assert trainer.reading.tokens == sum(len(row["input_ids"]) for row in trainer.train_dataset)


def test_measurements_are_shown_with_the_change_since_the_first(recipe_file: Path) -> None:
    events, lines, _ = watched(recipe_file, ["evaluation.steps=2"])
    found = [event for event in events if isinstance(event, Measurement)]
    losses = [line["eval_loss"] for line in lines if "eval_loss" in line]
    assert [each.step for each in found] == [0, 2, 4] or [each.step for each in found] == [0, 2, 4, 5]
    assert [each.loss for each in found] == losses
    assert found[0].change is None and found[0].kl is None and not found[0].rises, "no such text is measured here"
    assert [each.change for each in found[1:]] == [loss - losses[0] for loss in losses[1:]]


def test_watching_changes_no_weight(recipe_file: Path) -> None:
    _, _, weights = watched(recipe_file, [])
    trainer = trainer_of(load_recipe(recipe_file))
    trainer.train()
    alone = [p.detach() for pair in adapter_pairs(trainer.model) for p in (pair.a, pair.b)]
    assert all(torch.equal(x, y) for x, y in zip(weights, alone, strict=True))


def test_the_smoothed_loss_is_a_weighted_mean_without_its_start() -> None:
    loss = SmoothedLoss()
    assert loss.value is None
    for value in (2.0, math.nan, 2.0, math.inf):
        loss.add(value)
    assert loss.value == pytest.approx(2.0)
    loss.add(1.0)
    assert loss.value == pytest.approx((0.9**2 * 2 + 0.9 * 2 + 1) / (0.9**2 + 0.9 + 1))


def test_speed_leaves_out_the_first_step_and_what_is_between_steps() -> None:
    now = [0.0]
    pace = Pace(lambda: now[0])
    for measuring, seconds in ((5, 60), (0, 2), (10, 2)):
        began, now[0] = now[0], now[0] + measuring
        if measuring:
            pace.measured(began)
        pace.begin()
        now[0] += seconds
        pace.end(100)
    assert pace.elapsed == 79
    assert pace.tokens_per_second == 50
    assert pace.remaining(10) == 10 * 2
    assert pace.remaining(10, measurements=3) == 10 * 2 + 3 * 10, "each as long as the last"
    assert pace.remaining(0) == 0
