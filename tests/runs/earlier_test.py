"""A run folder that an earlier version wrote is read, merged and gone on with, or refused with the version."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM

from folora_q.cli.app import main
from folora_q.report.run_record import load_run
from folora_q.runs.result_files import read_evaluation
from folora_q.runs.results import GENERATED_TEXT
from tests.runs.earlier import FOLDERS, logits, placed, tuned

VERSIONS = sorted(path.name for path in FOLDERS.iterdir())


def code(*arguments: object) -> int:
    with pytest.raises(SystemExit) as end:
        main([str(argument) for argument in arguments])
    return end.value.code


@pytest.mark.parametrize("version", VERSIONS)
def test_its_adapter_says_what_it_said(version: str, tmp_path: Path) -> None:
    run = placed(version, tmp_path)
    recorded = load_file(run / "logits.safetensors")["logits"]
    assert torch.allclose(logits(tuned(tmp_path / "base", run / "adapter")), recorded, atol=1e-5)
    assert code("merge", run, "--base", "original", "--dtype", "float32") == 0
    merged = AutoModelForCausalLM.from_pretrained(run / "merged", dtype=torch.float32)
    assert torch.allclose(logits(merged), recorded, atol=1e-5)


@pytest.mark.parametrize("version", VERSIONS)
def test_it_is_reported_and_evaluated(version: str, tmp_path: Path, capfd) -> None:
    run = placed(version, tmp_path)
    assert load_run(run).finished
    assert code("report", run) == 0 and code("inspect", run) == 0
    capfd.readouterr()
    assert code("eval", run, "--output", tmp_path / "again") == 0
    before, again = (
        {text.name: text.loss.tuned.value for text in found.texts}
        for folder in (run, tmp_path / "again")
        if (found := read_evaluation(folder / "evaluation.json"))
    )
    assert GENERATED_TEXT in before, "0.1.0 called it own text"
    assert again.keys() - before.keys() == {"manual", "code"}, "general text that 0.1.0 did not measure"
    assert {name: again[name] for name in before} == pytest.approx(before, rel=1e-4)


@pytest.mark.parametrize("version", VERSIONS)
def test_its_checkpoint_is_gone_on_from_once_the_other_version_is_forced(
    version: str, tmp_path: Path, monkeypatch, capfd
) -> None:
    run = placed(version, tmp_path)
    found = json.loads((run / "run.json").read_text("utf-8"))
    found["status"], found["versions"]["folora-q"] = "interrupted", f"{version}.before"
    (run / "run.json").write_text(json.dumps(found), "utf-8")
    monkeypatch.chdir(tmp_path)
    again = ["train", run / "recipe.resolved.yaml", "training.max_steps=8", "--resume"]
    assert code(*again) == 2
    assert f"version of folora-q: {version}.before → " in capfd.readouterr().err
    assert code(*again, "--force") == 0
    assert "resuming from checkpoint-6" in capfd.readouterr().err
    steps = [json.loads(line) for line in (run / "metrics.jsonl").read_text("utf-8").splitlines()]
    assert [line["step"] for line in steps if "loss" in line] == list(range(1, 9))
