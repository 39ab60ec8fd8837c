"""Runs with training.objective dpo, through the command line."""

from __future__ import annotations

import json
import re
from pathlib import Path

import pytest

from folora_q.cli.app import main
from tests.distributed.train_test import assert_the_same, one, several
from tests.faults.commands import assert_resumed_exactly, metrics, run

DPO = "training.objective=dpo"


def outcome(*arguments: object) -> object:
    with pytest.raises(SystemExit) as caught:
        main([*map(str, arguments)])
    return caught.value.code


def test_a_gated_run_reports_what_it_prefers_and_eval_measures_the_same(
    pairs_file: Path, tmp_path: Path, capfd
) -> None:
    more = [DPO, "gate.rule=frozen", "training.learning_rate=0.02", "training.max_steps=12", "evaluation.steps=6"]
    assert run(pairs_file, *more) == 0
    printed = capfd.readouterr().out
    assert "task: DPO loss" in printed and "chosen rewarded more" in printed
    folder = tmp_path / "run"
    found = json.loads((folder / "evaluation.json").read_text())
    pairs = found["preference"]
    assert pairs["pairs"] == 16 and pairs["loss"]["base"]["value"] == pytest.approx(0.693147, abs=1e-6)
    assert pairs["loss"]["tuned"]["value"] < 0.68 and pairs["accuracy"]["value"] > 0.8
    assert pairs["margin"]["low"] < pairs["margin"]["value"] < pairs["margin"]["high"]
    measured = [line for line in metrics(folder) if "eval_loss" in line]
    assert [line["step"] for line in measured] == [0, 6, 12]
    assert measured[0]["eval_loss"] == pytest.approx(0.693147, abs=1e-6) and measured[0]["eval_reward_margin"] == 0
    assert measured[-1]["eval_loss"] == pytest.approx(pairs["loss"]["tuned"]["value"], abs=1e-6)
    assert measured[-1]["eval_reward_accuracy"] == pairs["accuracy"]["value"]
    card = (folder / "adapter" / "README.md").read_text()
    assert "Direct Preference Optimization" in card and "DPO loss, 16 pairs" in card
    assert outcome("report", folder) == 0
    assert "chosen rewarded more" in (folder / "report.html").read_text()
    assert outcome("eval", folder, "--output", tmp_path / "again") == 0
    again = json.loads((tmp_path / "again" / "evaluation.json").read_text())["preference"]
    assert again["loss"]["tuned"]["value"] == pytest.approx(pairs["loss"]["tuned"]["value"], abs=1e-5)
    capfd.readouterr()
    assert outcome("trim", folder, "--samples", 16) == 0
    assert re.search(rf"100.0%.* {pairs['loss']['tuned']['value']:.4f}", capfd.readouterr().out)


def test_an_interrupted_run_goes_on_bit_for_bit(pairs_file: Path, tmp_path: Path, monkeypatch) -> None:
    demanding = [pairs_file, DPO, "training.save_steps=2", "logging.logging_steps=1", "evaluation.steps=2"]
    assert_resumed_exactly(demanding, tmp_path, monkeypatch)


def test_two_processes_take_the_steps_of_one(pairs_file: Path, tmp_path: Path) -> None:
    """12 rows do not divide among batches of 8, so accelerate repeats rows, which do not count."""
    settings = ["gate.rule=frozen", "model.fsdp=shard", "training.activation_checkpointing=true"]
    one(pairs_file, tmp_path / "one", DPO, *(each for each in settings if "fsdp" not in each))
    several(2, pairs_file, tmp_path / "two", DPO, *settings)
    assert_the_same(tmp_path / "one", tmp_path / "two")
    pairs = [json.loads((tmp_path / name / "evaluation.json").read_text())["preference"] for name in ("one", "two")]
    assert pairs[1]["margin"]["value"] == pytest.approx(pairs[0]["margin"]["value"], rel=1e-3)


def test_rows_and_settings_that_do_not_fit_the_objective_are_refused(
    pairs_file: Path, recipe_file: Path, capfd
) -> None:
    def refusal(*overrides: str) -> str:
        assert outcome("validate", pairs_file, *overrides) == 2
        return capfd.readouterr().err

    assert "set training.objective: dpo" in refusal()
    assert "orpo is not supported: " in refusal("training.objective=orpo")
    assert "packing is for objective sft" in refusal(DPO, "training.packing=true")
    assert "remove assistant_only_loss" in refusal(DPO, "training.assistant_only_loss=false")
    assert "set adapter.lora_dropout to 0" in refusal(DPO, "adapter.lora_dropout=0.1")
    assert "data.overlong: split is for plain text" in refusal(DPO, "data.overlong=split")
    assert outcome("validate", pairs_file, DPO) == 0
    assert "of `preference`" in capfd.readouterr().out
    row = {"messages": [{"role": "user", "content": "a"}, {"role": "assistant", "content": "b"}]}
    (pairs_file.parent / "train.jsonl").write_text(json.dumps(row) + "\n")
    assert "training.objective: dpo needs pairs" in refusal(DPO)
