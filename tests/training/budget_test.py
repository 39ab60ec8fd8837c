"""A forgetting budget is spent, not exceeded, and kept by a resumed run."""

from __future__ import annotations

import json
from collections.abc import Callable
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
from folora_q.training.trainer import GatedTrainer
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


class Straight:
    """Steps of a linear schedule in one direction; what is limited is a function of the penalty, and of the step."""

    def __init__(self, spent: Callable[[float, int], Spent], steps: int = 120, limit: float = 1.0, rate: float = 0.02):
        self.steps, self.rate, self.step, self.complete = steps, rate, 0, list[bool]()
        self.b = torch.zeros(7, 5)
        self.layers = FrozenRows([(rows(), self.b, gate_of(), 1.0)])
        self.told: list[str] = []

        def measure(all_texts: bool) -> Spent:
            self.complete.append(all_texts)
            few, complete = spent(self.penalty, self.step)
            return Spent(few, complete if all_texts else None)

        self.budget = Budget(BudgetPlan(limit, steps, rate * (steps + 1) / 2, measure, self.told.append), self.layers)

    @property
    def penalty(self) -> float:
        return self.layers.energies().penalty

    def train(self, until: int | None = None, skipped: int = 0) -> list[float]:
        """Take steps, the first ones without effect, and return the penalties after them."""
        direction = torch.randn(7, 5, generator=torch.Generator().manual_seed(3))
        optimizer = torch.optim.SGD([torch.nn.Parameter(self.b)], lr=self.rate)
        penalties = []
        while self.step < (until or self.steps):
            self.step += 1
            optimizer.param_groups[0]["lr"] = self.rate * (self.steps + 1 - self.step) / self.steps
            self.budget.before_step(optimizer)
            if self.step > skipped:
                self.b += optimizer.param_groups[0]["lr"] * direction
            self.budget.after_step(optimizer, self.step)
            penalties.append(self.penalty)
        return penalties


@pytest.mark.parametrize("error", [0.5, 1.0, 2.0])
def test_few_texts_that_are_not_like_all_are_corrected(error: float) -> None:
    """Where few texts show too much, the budget seems reached too early: what is left must still be used."""
    run = Straight(lambda penalty, step: Spent(error * penalty, penalty))
    run.train()
    assert sum(run.complete) == COMPLETE
    assert run.budget.state.correction == pytest.approx(1 / error, rel=0.01)
    assert 0.94 < run.penalty <= 1


def test_rounding_is_told_from_what_is_spent() -> None:
    run = Straight(lambda penalty, step: Spent(0.3 + penalty, 0.3 + penalty))
    run.train()
    assert 0.85 < 0.3 + run.penalty <= 1 and not run.budget.exceeded


@pytest.mark.parametrize("steps", [1, 2, 3, 120])
def test_a_first_step_over_the_limit_is_shrunk(steps: int) -> None:
    """It is not taken for rounding, and the learning rate is not raised."""
    run = Straight(lambda penalty, step: Spent(penalty, penalty), steps, rate=20.0)
    penalties = run.train()
    assert max(penalties) <= 1.0001 and run.budget.state.pace == 1
    assert run.penalty > 0.8 and not run.budget.exceeded


def test_less_than_rounding_cannot_be_kept_and_the_rate_is_not_raised() -> None:
    run = Straight(lambda penalty, step: Spent(1.8 + penalty, 1.8 + penalty))
    run.train()
    assert run.budget.exceeded and run.budget.state.pace == 1 and run.penalty < 0.01


def test_an_update_that_turns_out_to_cost_nothing_is_not_held_back() -> None:
    """As the rise of a loss, which may fall again."""
    run = Straight(lambda penalty, step: Spent(*[penalty if step < 30 else -0.003] * 2))
    penalties = run.train()
    assert penalties[28] <= 1 < 4 < run.penalty and run.budget.state.strength == 0


def test_steps_without_effect_are_not_measured() -> None:
    run = Straight(lambda penalty, step: Spent(penalty, penalty))
    run.train(skipped=2)
    assert run.budget.state.measured[0][0] == 4 and 0.9 < run.penalty <= 1


@pytest.mark.parametrize("wrong", [float("nan"), float("inf")])
@pytest.mark.parametrize("at", [1, 60, 120])
def test_a_measurement_that_is_not_finite_is_ignored(wrong: float, at: int) -> None:
    run = Straight(lambda penalty, step: Spent(*[wrong if step == at else penalty] * 2))
    run.train()
    assert 0.85 < run.penalty <= 1 and run.budget.state.correction == 1
    assert any("is not finite" in line for line in run.told)


def test_an_earlier_update_is_kept_to_the_limit_too() -> None:
    run = Straight(lambda penalty, step: Spent(penalty if step < 60 else 2 * penalty, penalty * (1 + (step >= 60))))
    run.train(until=50)
    earlier = run.b.clone()
    run.train()
    run.b.copy_(earlier)
    assert 2 * run.penalty > 1
    run.budget.conclude(50)
    assert 0.9 < 2 * run.penalty <= 1 and run.budget.to_dict()["spent"] == pytest.approx(2 * run.penalty)


@pytest.mark.parametrize("ends", ["training.load_best_model_at_end=true", "training.early_stopping_patience=1"])
def test_the_best_step_is_kept_to_the_budget(recipe_file: Path, tmp_path: Path, ends: str, monkeypatch) -> None:
    """The held-out loss rises from step 20 on, so the update of that step is kept, measured and shrunk."""
    measured, folder = GatedTrainer._measured, tmp_path / "spent"

    def rising(self: GatedTrainer, prefix: str) -> dict[str, float]:
        step = self.state.global_step
        return measured(self, prefix) | {f"{prefix}_loss": 1 + abs(step - 20) / 40}

    monkeypatch.setattr(GatedTrainer, "_measured", rising)
    arguments = [recipe_file, *FROZEN, *TEXTS, "evaluation.steps=10", "training.save_steps=10", ends]
    assert run(*arguments, "gate.budget={kl: 0.05, num_texts: 12}", f"training.output_dir={folder}") == 0
    record = manifest(folder)["budget"]
    step, value = record["measured"][-1]
    assert step == 20 and record["spent"] == value <= 0.05 and load_run(folder).budget.spent == value
    assert 0.5 * value <= unseen_kl(folder) <= 1.3 * value, "the adapter that was saved is the one that was measured"


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


def test_few_texts_that_steer_are_a_warning(recipe_file: Path) -> None:
    def advice(*overrides: str) -> str:
        return "".join(load_recipe(recipe_file, [*FROZEN, *overrides]).advice)

    few = ["gate.budget={kl: 0.02}", "proxy.num_heldout_samples=30", "evaluation.num_proxy_samples=9"]
    assert "25 held-out texts steer gate.budget" in advice(*few)
    assert "steer" not in advice("gate.budget={kl: 0.02}", "proxy.num_heldout_samples=384")
    assert "steer" not in advice("gate.budget={forgetting: 0.02}") + advice()


def test_a_budget_of_forgetting_is_kept(recipe_file: Path, tmp_path: Path) -> None:
    folder = tmp_path / "spent"
    arguments = [recipe_file, *FROZEN, *TEXTS, f"training.output_dir={folder}", "gate.budget={forgetting: 0.02}"]
    assert run(*arguments) == 0
    assert manifest(folder)["budget"]["measured"][-1][1] <= 0.02


@pytest.mark.parametrize(("kl", "rate"), [(0.05, 2e-3), (1, 2e-5)])
def test_a_resumed_run_spends_as_one_that_was_not_interrupted(
    recipe_file: Path, tmp_path: Path, kl: float, rate: float, monkeypatch
) -> None:
    """The second budget is not reached: few texts are measured after each step, and corrected."""
    arguments = [
        recipe_file,
        *FROZEN,
        *TEXTS,
        "training.max_steps=12",
        "training.save_steps=4",
        f"gate.budget={{kl: {kl}, num_texts: 12}}",
        f"training.learning_rate={rate}",
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
        (["gate.budget={kl: 0.02}", "gate.rule=frozen", "adapter.modules_to_save=[lm_head]"], "modules_to_save"),
        (["gate.budget={forgetting: 0.02}", "gate.rule=frozen", "evaluation.general_text=[]"], "which is empty"),
        (["gate.budget={kl: 0.02}", "gate.rule=frozen", "evaluation.steps=2", "evaluation.max_kl=0.03"], "0.04"),
    ],
)
def test_a_budget_that_cannot_be_kept_is_refused(recipe_file: Path, overrides: list[str], says: str) -> None:
    with pytest.raises(UserError, match=says):
        load_recipe(recipe_file, overrides)
