"""A step whose loss or gradient is not finite, or blows up, is skipped: no weight and no optimizer sees it."""

from __future__ import annotations

import copy
import json
import math
import random
import signal
from pathlib import Path
from typing import Any

import pytest
from torch.utils._pytree import tree_flatten

from folora_q.models.adapters import adapter_pairs
from folora_q.recipe import load_recipe
from folora_q.training import step_guards as guards
from folora_q.training.step_guards import SkippedSteps
from folora_q.training.trainer import GatedTrainer
from tests.faults.commands import assert_the_same_run, at_step, manifest, metrics, run, signalled, steps_saved
from tests.training.trainer_test import trainer_of


def spoil(monkeypatch: pytest.MonkeyPatch, steps: set[int], factor: float = 1.0, added: float = 0.0) -> None:
    """Change the loss of some steps, counted from 1. Added infinity leaves the gradient as it is."""
    compute = GatedTrainer.compute_loss

    def spoiled(self: GatedTrainer, *args: Any, **kwargs: Any) -> Any:
        loss = compute(self, *args, **kwargs)
        # The rehearsal comes before the first step's own micro-batches.
        begun = self.callback_handler.train_dataloader is not None and self._rehearsed
        return loss * factor + added if begun and self.state.global_step + 1 in steps else loss

    rehearse = GatedTrainer.rehearse

    def rehearsed(self: GatedTrainer) -> None:
        self._rehearsed = False
        rehearse(self)
        self._rehearsed = True

    monkeypatch.setattr(GatedTrainer, "compute_loss", spoiled)
    monkeypatch.setattr(GatedTrainer, "rehearse", rehearsed)


def held(trainer: GatedTrainer) -> list[Any]:
    """Weights and the optimizer's state, but for the learning rate."""
    state = copy.deepcopy(trainer.optimizer.state_dict())
    del state["param_groups"]
    return [p.detach().clone() for pair in adapter_pairs(trainer.model) for p in (pair.a, pair.b)] + [state]


def equal(one: list[Any], other: list[Any]) -> bool:
    (leaves, shape), (others, other_shape) = tree_flatten(one), tree_flatten(other)
    return shape == other_shape and all(bool((a == b).all() if hasattr(a, "all") else a == b)
                                        for a, b in zip(leaves, others, strict=True))  # fmt: skip


@pytest.mark.parametrize("fault", [{"factor": math.nan}, {"factor": math.inf}, {"added": math.inf}, {"factor": 3.0}])
def test_a_skipped_step_leaves_weights_and_optimizer_as_they_were(recipe_file: Path, fault: dict, monkeypatch) -> None:
    monkeypatch.setattr(guards, "MIN_MEASURED_LOSSES", 1)
    spoil(monkeypatch, {2}, **fault)
    changes = ["training.gradient_accumulation_steps=2", "logging.logging_steps=1", "gate.refresh_every=1"]
    trainer = trainer_of(load_recipe(recipe_file, changes), gate_lambda=4.0)
    after: list[tuple[list[Any], float]] = []
    ended = trainer.callback_handler.on_step_end

    def on_step_end(*args: Any) -> Any:
        after.append((held(trainer), trainer.lr_scheduler.get_last_lr()[0]))
        return ended(*args)

    monkeypatch.setattr(trainer.callback_handler, "on_step_end", on_step_end)
    told: list[str] = []
    trainer.skipped.tell = told.append
    trainer.train()
    (first, rate), (second, next_rate), (third, _) = after[:3]
    assert equal(first, second) and not equal(second, third)
    assert rate != next_rate, "the schedule goes on"
    assert trainer.optimizer.optimizer.steps_taken == 4
    [line] = told
    assert line.startswith("step 2 skipped: loss ") and line.endswith("(1 in a row, the run ends at 3)")
    losses = {line["step"]: line["loss"] for line in trainer.state.log_history if "loss" in line}
    assert list(losses) == [1, 3, 4, 5] and all(map(math.isfinite, losses.values())), "no mean keeps what is not finite"
    assert math.isfinite(trainer.state.log_history[-1]["train_loss"])


def test_the_mean_of_a_window_is_of_the_steps_that_were_taken(recipe_file: Path, monkeypatch) -> None:
    def losses(every: int) -> dict[int, float]:
        trainer = trainer_of(load_recipe(recipe_file, [f"logging.logging_steps={every}", "training.max_steps=4"]))
        trainer.train()
        return {line["step"]: line["loss"] for line in trainer.state.log_history if "loss" in line}

    spoil(monkeypatch, {3}, factor=math.nan)
    single, window = losses(1), losses(4)
    assert list(single) == [1, 2, 4] and list(window) == [1, 4]  # the first step has a line in any case
    assert window[4] == pytest.approx((single[2] + single[4]) / 2, rel=1e-6)


def test_too_many_in_a_row_end_the_run_and_the_last_good_checkpoint_stays(
    saving: list[object], tmp_path: Path, monkeypatch, capfd
) -> None:
    spoil(monkeypatch, {3, 5, 6, 7, 8, 9}, factor=math.nan)
    more = ["training.max_steps=20", "training.max_skipped_steps=4", "training.save_steps=1"]
    assert run(*saving, *more, "training.save_total_limit=1") == 1
    folder = tmp_path / "stopped" / "run"
    talk = capfd.readouterr().err
    assert "error: 4 steps in a row could not be taken, the last of them step 8 (loss nan, gradient norm nan" in talk
    assert "checkpoint-4 is the last good checkpoint" in talk
    assert talk.count(" skipped: loss nan, gradient norm nan") == 5
    assert steps_saved(folder) == [4, 7], "the newest, and the one before the trouble"
    assert manifest(folder)["status"] == "failed"
    assert [line["step"] for line in metrics(folder) if "skipped" in line] == [3, 5, 6, 7, 8]
    for line in (folder / "metrics.jsonl").read_text().splitlines():
        json.loads(line, parse_constant=lambda name: pytest.fail(f"{name} is no JSON"))


def test_a_run_goes_on_with_its_count_of_skipped_steps(saving: list[object], tmp_path: Path, monkeypatch) -> None:
    monkeypatch.setattr(guards, "MIN_MEASURED_LOSSES", 2)
    spoil(monkeypatch, {2, 3}, factor=math.nan)
    spoil(monkeypatch, {6}, factor=3.0)
    straight = tmp_path / "straight" / "run"
    assert run(*saving, f"training.output_dir={straight}") == 0
    with monkeypatch.context() as patch:
        at_step(patch, 4, signalled(signal.SIGINT))
        assert run(*saving) == 130
    folder = tmp_path / "stopped" / "run"
    progress = json.loads((folder / "checkpoint-4" / "progress.json").read_text())
    assert progress["skipped"] == [0, 2]
    assert progress["losses"] == [[line["loss"] for line in metrics(folder) if line["step"] in (1, 4)]] * 2
    assert run(*saving, "--resume") == 0
    assert [line["step"] for line in metrics(folder) if "skipped" in line] == [2, 3, 6]
    assert_the_same_run(straight, folder)


def test_a_learning_rate_that_is_far_too_large_is_named_with_the_loss_and_its_bound(
    saving: list[object], tmp_path: Path, monkeypatch, capfd
) -> None:
    def far_too_large() -> None:
        for group in optimizers[0].param_groups:
            group["lr"] *= 1e4

    optimizers, create = [], GatedTrainer.create_optimizer
    monkeypatch.setattr(GatedTrainer, "create_optimizer", lambda *a: optimizers.append(create(*a)) or optimizers[0])
    at_step(monkeypatch, 40, far_too_large)
    assert run(*saving, "training.max_steps=60", "training.lr_scheduler_type=constant") == 1
    talk = capfd.readouterr().err
    assert "error: 3 steps in a row could not be taken, the last of them step " in talk
    losses = {line["step"]: line["loss"] for line in metrics(tmp_path / "stopped" / "run") if "loss" in line}
    assert max(losses[step] for step in range(10, 41)) < 1.3
    assert f": over {math.log(261) / 2:.4g}, training.max_loss_factor" in talk and "training.learning_rate" in talk
    assert set(losses) == set(range(1, max(losses) + 1)) and max(losses) in (40, 41)


@pytest.mark.parametrize(("spread", "share"), [(0.15, 0), (0.3, 0), (0.5, 5e-4)])
@pytest.mark.parametrize("start", [0.4, 1.5, 3.0])
def test_ordinary_noise_is_no_blow_up(start: float, spread: float, share: float) -> None:
    """Losses of small batches, spread as exp(normal), while their middle falls to a tenth; 50,000 steps."""
    chance, skipped = random.Random(f"{spread} {start}"), SkippedSteps(3, 2.0, vocabulary=32_000)
    for step in range(50_000):
        loss = start * 10 ** (-step / 50_000) * math.exp(chance.gauss(0, spread))
        if (reason := skipped.reason(loss, norm=1.0)) is None:
            skipped.taken(loss)
        else:
            skipped.add(step, loss, 1.0, reason, None)  # raises if there are three in a row
    assert skipped.total <= share * 50_000
    assert skipped.reason(7.5, norm=1.0) is not None, "what a model that has lost everything costs"
