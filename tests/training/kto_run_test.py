"""Runs with training.objective kto, through the command line."""

from __future__ import annotations

import json
import re
from pathlib import Path

import pytest

from tests.distributed.train_test import assert_the_same, one, several
from tests.faults.commands import assert_resumed_exactly, metrics, run
from tests.training.dpo_run_test import outcome

KTO = "training.objective=kto"


def test_a_gated_run_reports_rewards_and_eval_measures_the_same(labelled_file: Path, tmp_path: Path, capfd) -> None:
    more = [KTO, "gate.rule=frozen", "training.learning_rate=0.02", "training.max_steps=12", "evaluation.steps=6"]
    assert run(labelled_file, *more) == 0
    printed = capfd.readouterr().out
    for words in ("task: KTO loss", "reward fits the label", "desirable answers: loss"):
        assert words in printed
    folder = tmp_path / "run"
    evaluation = json.loads((folder / "evaluation.json").read_text())
    found = evaluation["preference"]
    assert found["objective"] == "kto" and found["pairs"] == 39 and found["loss"]["base"]["value"] == 0.5
    assert found["loss"]["tuned"]["value"] < 0.45 and found["accuracy"]["value"] > 0.8 and found["reference"] >= 0
    assert 0 < found["margin"]["low"] < found["margin"]["value"] < found["margin"]["high"]
    [task] = [text for text in evaluation["texts"] if text["kind"] == "task"]
    assert task["texts"] == 26, "the loss is that of desirable answers"
    measured = [line for line in metrics(folder) if "eval_loss" in line]
    assert [line["eval_loss"] for line in measured][0] == 0.5 and measured[0]["eval_reward_reference"] == 0
    assert measured[-1]["eval_loss"] == pytest.approx(found["loss"]["tuned"]["value"], abs=1e-6)
    assert measured[-1]["eval_reward_margin"] == pytest.approx(found["margin"]["value"], abs=1e-6)
    card = (folder / "adapter" / "README.md").read_text()
    assert "Kahneman-Tversky Optimization" in card and "KTO loss, 39 labelled answers" in card
    assert outcome("report", folder) == 0
    page = (folder / "report.html").read_text()
    assert "reward fits the label" in page and "desirable answers: loss" in page
    assert outcome("eval", folder, "--output", tmp_path / "again") == 0
    again = json.loads((tmp_path / "again" / "evaluation.json").read_text())["preference"]
    assert again["loss"]["tuned"]["value"] == pytest.approx(found["loss"]["tuned"]["value"], abs=1e-5)


def test_an_interrupted_run_goes_on_bit_for_bit(labelled_file: Path, tmp_path: Path, monkeypatch) -> None:
    demanding = [labelled_file, KTO, "training.save_steps=2", "logging.logging_steps=1", "data.max_eval_samples=6"]
    assert_resumed_exactly(demanding, tmp_path, monkeypatch)


def test_two_processes_take_the_steps_of_one(labelled_file: Path, tmp_path: Path) -> None:
    """12 rows do not divide among batches of 8, so accelerate repeats rows, which do not count, neither in z."""
    settings = [KTO, "data.max_eval_samples=6"]
    one(labelled_file, tmp_path / "one", *settings)
    several(2, labelled_file, tmp_path / "two", *settings)
    assert_the_same(tmp_path / "one", tmp_path / "two")
    found = [json.loads((tmp_path / name / "evaluation.json").read_text())["preference"] for name in ("one", "two")]
    assert found[1]["margin"]["value"] == pytest.approx(found[0]["margin"]["value"], rel=1e-3)
    assert found[0]["reference"] > 0 and found[1]["reference"] == pytest.approx(found[0]["reference"], rel=1e-3)


def test_rows_and_settings_that_do_not_fit_the_objective_are_refused(labelled_file: Path, capfd) -> None:
    def refusal(*overrides: str) -> str:
        assert outcome("validate", labelled_file, *overrides) == 2
        return capfd.readouterr().err

    assert "set training.objective: kto" in refusal()
    assert "training.objective: dpo needs pairs" in refusal("training.objective=dpo")
    assert "with kto every answer" in refusal(KTO, "training.packing=true")
    assert "objective kto compares answers alone" in refusal(KTO, "training.completion_only_loss=false")
    assert "set adapter.lora_dropout to 0" in refusal(KTO, "adapter.lora_dropout=0.1")
    assert "not for the answers of objective kto" in refusal(KTO, "data.overlong=split")
    assert outcome("validate", labelled_file, KTO) == 0
    assert "of `labelled`" in capfd.readouterr().out


def test_preview_names_the_label_and_shows_what_is_trained(labelled_file: Path, capfd) -> None:
    assert outcome("preview", labelled_file, KTO, "-n", "12") == 0
    printed = capfd.readouterr().out
    counts = [len(re.findall(rf" {label} \d+ tokens", printed)) for label in ("desirable", "undesirable")]
    assert counts == [8, 4] and "set training.undesirable_weight=2" in printed
    assert "12 sequences by length" in printed
