"""The demonstration of `keep`: three runs of one recipe, and a table of what they keep."""

from __future__ import annotations

from pathlib import Path

import pytest
from click.testing import CliRunner

from benchmarks.keep import demonstration
from folora_q.cli.app import main
from folora_q.runs.result_files import read_evaluation


def test_the_three_variants_are_trained_and_shown(
    recipe_file: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def in_this_process(command: list[str], **settings: object) -> object:
        with pytest.raises(SystemExit) as caught:
            main(command[3:])  # after `python -m folora_q`
        return type("Done", (), {"returncode": caught.value.code})()

    monkeypatch.setattr(demonstration.subprocess, "run", in_this_process)
    settings = ["--set", "keep.max_new_tokens=2", "--set", "training.max_steps=2"]
    arguments = [str(recipe_file), "--keep", "arithmetic", "--output", str(tmp_path / "runs"), *settings]
    done = CliRunner().invoke(demonstration.main, arguments, catch_exceptions=False)
    assert done.exit_code == 0, done.output
    lines = [line for line in done.output.splitlines() if line.startswith("| ")]
    assert lines[0] == f"| held out | base | {' | '.join(demonstration.VARIANTS)} |"
    folders = ["plain-QLoRA", "default-with-keep", "default-keep-measured-only"]
    found = [read_evaluation(tmp_path / "runs" / name / "evaluation.json") for name in folders]
    [row] = [line for line in lines if line.startswith("| arithmetic: KL on the base's answers")]
    for cell, evaluation in zip(row.split(" | ")[2:], found, strict=True):
        assert evaluation is not None and cell.startswith(f"{evaluation.kept[0].kl.value:.4f} (")
    assert any(line.startswith("| arithmetic: exact result | 0.0% |") for line in lines)
    again = CliRunner().invoke(demonstration.main, arguments, catch_exceptions=False)
    assert again.output.splitlines()[-len(lines) :] == lines, "complete runs are not repeated"
