"""Warm-up never eats a run: the first step has a rate, and a third of the steps at most are spent on it."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from transformers import get_scheduler

from folora_q.cli.app import main
from folora_q.errors import RunError
from folora_q.models.adapters import adapter_pairs
from folora_q.recipe import load_recipe
from folora_q.training.schedule import rising_from_the_first_step, warmup_of
from tests.training.trainer_test import trainer_of


@pytest.mark.parametrize(
    ("asked", "steps", "found"),
    [(0.03, 1, 0), (0.03, 2, 0), (0.03, 3, 1), (0.03, 100, 3), (0.5, 9, 3), (10, 9, 3), (10, 100, 10), (0, 50, 0)],
)
def test_warmup_takes_a_third_at_most(asked: float, steps: int, found: int) -> None:
    assert warmup_of(asked, steps) == found


def rates(kind: str, warmup: int, steps: int, ours: bool) -> list[float]:
    optimizer = torch.optim.SGD([torch.nn.Parameter(torch.zeros(1))], lr=2.0)
    scheduler = get_scheduler(kind, optimizer, warmup, steps)
    scheduler = rising_from_the_first_step(scheduler, warmup) if ours else scheduler
    found = []
    for _ in range(steps):
        found.append(optimizer.param_groups[0]["lr"])
        optimizer.step()
        scheduler.step()
    return found


@pytest.mark.parametrize(
    "kind",
    ["linear", "cosine", "cosine_with_restarts", "polynomial", "constant", "constant_with_warmup", "inverse_sqrt"],
)
@pytest.mark.parametrize(("warmup", "steps"), [(0, 1), (0, 7), (1, 3), (3, 100), (30, 90)])
def test_every_schedule_begins_above_zero_and_is_transformers_own_after_its_warmup(
    kind: str, warmup: int, steps: int
) -> None:
    ours, theirs = (rates(kind, warmup, steps, which) for which in (True, False))
    assert min(ours) > 0
    assert ours[warmup:] == theirs[warmup:]
    if kind != "constant":
        assert ours[:warmup] == pytest.approx([2 * (step + 1) / (warmup + 1) for step in range(warmup)])


@pytest.mark.parametrize(
    ("overrides", "first", "steps"),
    [(["training.max_steps=1"], 1, 1), (["training.max_steps=3"], 0.5, 3), (["training.warmup_steps=50"], 0.5, 5)],
)
def test_a_short_run_learns_from_its_first_step_on(
    recipe_file: Path, overrides: list[str], first: float, steps: int
) -> None:
    recipe = load_recipe(recipe_file, [*overrides, "logging.logging_steps=1"])
    trainer = trainer_of(recipe)
    trainer.train()
    lines = [line for line in trainer.state.log_history if "learning_rate" in line]
    assert len(lines) == steps and all(line["learning_rate"] > 0 for line in lines)
    assert lines[0]["learning_rate"] == pytest.approx(first * recipe.training.learning_rate)
    trainer.require_learned()


@pytest.mark.parametrize("gate", ["gate.enabled=false", "gate.rule=step", "gate.rule=frozen", "gate.rule=spectral"])
def test_a_run_that_learned_nothing_is_an_error(recipe_file: Path, tmp_path: Path, capfd, gate: str) -> None:
    arguments = ["train", str(recipe_file), gate, "evaluation.metric=none", "training.learning_rate=1e-60"]
    with pytest.raises(SystemExit) as caught:
        main(arguments)
    assert caught.value.code == 1
    text, talk = capfd.readouterr()
    assert "error: nothing was learned in 5 steps: B is zero in every layer\n" in talk
    assert "hint: raise training.learning_rate, or take more steps" in talk
    assert "What was learned" not in text and not (tmp_path / "run" / "adapter").exists()
    assert json.loads((tmp_path / "run" / "run.json").read_text())["status"] == "failed"


def test_the_hint_says_where_every_step_was_skipped(recipe_file: Path) -> None:
    trainer = trainer_of(load_recipe(recipe_file))
    trainer.state.global_step = trainer.skipped.total = 2
    with pytest.raises(RunError, match="nothing was learned in 2 steps") as caught:
        trainer.require_learned()
    assert caught.value.hint is not None and "every step was skipped" in caught.value.hint
    adapter_pairs(trainer.model)[-1].b.data[0, 0] = 1e-30
    trainer.require_learned()


def test_a_run_of_fewer_rows_than_a_batch_learns_and_warns(recipe_file: Path, tmp_path: Path, capfd) -> None:
    """One step at rate zero, a table of zeros, "Next: merge it", exit code 0: that is what it was."""
    rows = (tmp_path / "train.jsonl").read_text().splitlines()[:3]
    (tmp_path / "train.jsonl").write_text("\n".join(rows))
    text = recipe_file.read_text().replace("  max_steps: 5\n", "")
    recipe_file.write_text(text)
    for command in ("validate", "preview", "train"):
        with pytest.raises(SystemExit) as caught:
            main([command, str(recipe_file), *(["evaluation.metric=none"] if command == "train" else [])])
        assert caught.value.code == 0
        shown = " ".join(capfd.readouterr().out.split())
        assert "warning: 3 training sequences give 1 step" in shown.replace("warning ", "warning: ", 1), command
        assert "4 held-out rows are too few" in shown, command
    saved = json.loads((tmp_path / "run" / "run.json").read_text())
    assert len(saved["warnings"]) == 2
    evaluation = json.loads((tmp_path / "run" / "evaluation.json").read_text())
    assert any(layer["update_norm"] > 0 for layer in evaluation["layers"])
