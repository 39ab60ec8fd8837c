"""A forgetting budget is spent, not exceeded, and kept by a resumed run."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
import yaml

from folora_q.cli.app import main
from folora_q.core.shrink import FrozenRows
from folora_q.errors import UserError
from folora_q.recipe import load_recipe
from folora_q.report.page import report_page
from folora_q.report.run_record import load_run
from folora_q.report.text import short
from folora_q.training.budget import COMPLETE, Budget, BudgetPlan, Spent
from tests.core.gate_test import gate_of, rows
from tests.faults.commands import assert_the_same_run, manifest, run
from tests.faults.resume_test import stop_at

TEXTS = ["proxy.num_samples=24", "proxy.num_heldout_samples=32", "evaluation.num_proxy_samples=6"]
FROZEN = ["gate.rule=frozen", "training.learning_rate=2e-3", "training.max_steps=40", "logging.logging_steps=10"]


def unseen_kl(folder: Path) -> float:
    """The KL on text that the controller has not seen, complete and cut."""
    texts = json.loads((folder / "evaluation.json").read_text())["texts"]
    found = [text for text in texts if text["kind"] == "own"]
    assert all(text["texts"] == 20 for text in found), "those that steered the budget are left out"
    return sum(text["kl"]["value"] * text["tokens"] for text in found) / sum(text["tokens"] for text in found)


@pytest.mark.parametrize("kl", [0.01, 0.2])
def test_a_budget_is_spent_and_not_exceeded(recipe_file: Path, tmp_path: Path, kl: float, capfd) -> None:
    """The default rate alone spends about .0005 here."""
    folder = tmp_path / "spent"
    arguments = [recipe_file, *FROZEN, *TEXTS, f"training.output_dir={folder}"]
    assert run(*arguments, f"gate.budget={{kl: {kl}, num_texts: 12}}") == 0
    assert "budget at step 40: " in capfd.readouterr().err
    record = manifest(folder)["budget"]
    step, value = record["measured"][-1]
    assert record["limit"] == kl and step == 40 and 0.85 * kl <= value <= kl
    assert 0.7 * kl <= unseen_kl(folder) <= 1.15 * kl
    metrics = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    predicted = [line["budget_spent"] for line in metrics if "budget_spent" in line]
    assert predicted[-1] == pytest.approx(value, rel=0.05)
    shown = load_run(folder)
    assert shown.budget.limit == kl and shown.budget.spent == value
    assert f"of {short(kl)}, by the texts that steered it" in report_page(shown).html


@pytest.mark.parametrize("error", [0.5, 1.0, 2.0])
def test_few_texts_that_are_not_like_all_are_corrected(error: float) -> None:
    """Steps of a linear schedule in one direction; what is limited is the penalty, and few texts are wrong by a factor.

    Where few texts show too much, the budget seems reached too early: what is left must still be used.
    """
    steps, rate, limit, b = 120, 0.02, 1.0, torch.zeros(7, 5)
    direction = torch.randn(7, 5, generator=torch.Generator().manual_seed(3))
    layers = FrozenRows([(rows(), b, gate_of(), 1.0)])
    complete: list[int] = []

    def measure(all_texts: bool) -> Spent:
        value = layers.energies().penalty
        complete.append(all_texts)
        return Spent(error * value, value if all_texts else None)

    budget = Budget(BudgetPlan(limit, steps, rate * (steps + 1) / 2, measure), layers)
    optimizer = torch.optim.SGD([torch.nn.Parameter(b)], lr=rate)
    for step in range(1, steps + 1):
        optimizer.param_groups[0]["lr"] = rate * (steps + 1 - step) / steps
        budget.before_step(optimizer)
        b += optimizer.param_groups[0]["lr"] * direction
        budget.after_step(optimizer, step)
    assert sum(complete) == COMPLETE
    assert budget.state.correction == pytest.approx(1 / error, rel=0.01)
    assert 0.9 * limit < layers.energies().penalty <= limit


def test_a_later_evaluation_leaves_out_what_steered(recipe_file: Path, tmp_path: Path) -> None:
    folder, again = tmp_path / "spent", tmp_path / "again"
    arguments = [
        *FROZEN,
        *TEXTS,
        "training.max_steps=4",
        "gate.budget={kl: 0.01, num_texts: 12}",
        f"training.output_dir={folder}",
    ]
    assert run(recipe_file, *arguments) == 0
    with pytest.raises(SystemExit):
        main(["eval", str(folder), "--output", str(again)])
    assert unseen_kl(again) == pytest.approx(unseen_kl(folder), rel=1e-4)


def test_a_budget_has_more_texts_by_default(recipe_file: Path) -> None:
    def texts(*overrides: str) -> tuple[int, int, int]:
        recipe = load_recipe(recipe_file, [*FROZEN, *overrides])
        return recipe.evaluation.num_proxy_samples, recipe.steering_texts, recipe.proxy.num_heldout_samples

    text = recipe_file.read_text("utf-8")
    recipe = yaml.safe_load(text)
    recipe["proxy"].pop("num_heldout_samples", None)
    recipe["evaluation"].pop("num_proxy_samples", None)
    recipe_file.write_text(yaml.safe_dump(recipe), "utf-8")
    assert texts() == (16, 0, 32)
    assert texts("gate.budget={kl: 0.02}") == (128, 320, 384)
    assert texts("gate.budget={kl: 0.02, num_texts: 50}") == (50, 50, 384)
    assert texts("gate.budget={kl: 0.02}", "proxy.num_heldout_samples=30") == (25, 25, 30)
    assert texts("gate.budget={kl: 0.02}", "evaluation.num_proxy_samples=9") == (9, 320, 384)
    assert texts("gate.budget={forgetting: 0.02}") == (128, 0, 32)


def test_a_budget_of_forgetting_is_kept(recipe_file: Path, tmp_path: Path) -> None:
    folder = tmp_path / "spent"
    arguments = [recipe_file, *FROZEN, *TEXTS, f"training.output_dir={folder}", "gate.budget={forgetting: 0.02}"]
    assert run(*arguments) == 0
    assert manifest(folder)["budget"]["measured"][-1][1] <= 0.02


def test_a_resumed_run_spends_as_one_that_was_not_interrupted(recipe_file: Path, tmp_path: Path, monkeypatch) -> None:
    arguments = [
        recipe_file,
        *FROZEN,
        *TEXTS,
        "training.max_steps=12",
        "training.save_steps=4",
        "gate.budget={kl: 0.05, num_texts: 12}",
    ]
    straight, stopped = tmp_path / "straight" / "run", tmp_path / "stopped" / "run"
    assert run(*arguments, f"training.output_dir={straight}") == 0
    stop_at(monkeypatch, 7, [*arguments, f"training.output_dir={stopped}"])
    assert run(*arguments, f"training.output_dir={stopped}", "--resume") == 0
    assert_the_same_run(straight, stopped)
    spent = [manifest(folder)["budget"] for folder in (stopped, straight)]
    for each in spent:
        each.pop("seconds")
    assert spent[0] == spent[1]


@pytest.mark.parametrize(
    ("overrides", "says"),
    [
        (["gate.budget={kl: 0.02, forgetting: 0.01}"], "name one of kl and forgetting"),
        (["gate.budget={}"], "name one of kl and forgetting"),
        (["gate.budget={kl: 0.02}", "gate.rule=step"], "rule: frozen"),
        (["gate.budget={kl: 0.02}", "gate.enabled=false"], "rule: frozen"),
        (
            ["gate.budget={kl: 0.02}", "gate.rule=frozen", "evaluation.num_proxy_samples=99"],
            "proxy.num_heldout_samples",
        ),
    ],
)
def test_a_budget_that_cannot_be_kept_is_refused(recipe_file: Path, overrides: list[str], says: str) -> None:
    with pytest.raises(UserError, match=says):
        load_recipe(recipe_file, overrides)
