"""An evaluation that fails costs the evaluation: the adapter is kept, and the error says how to repeat it."""

from __future__ import annotations

import json
import shlex
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from folora_q.cli.app import main
from folora_q.evaluation import evaluate as evaluating
from folora_q.workflows import training_run
from tests.faults.commands import manifest, run

# Right for the reference, which is tried before training, and for no answer.
PICKY = "def picky(answer, reference):\n    assert answer == reference, 'no such answer'\n    return 1\n"


def command(*arguments: object) -> int:
    with pytest.raises(SystemExit) as caught:
        main([str(argument) for argument in arguments])
    return caught.value.code


@pytest.fixture
def picky(recipe_file: Path, tmp_path: Path) -> list[object]:
    (tmp_path / "metric.py").write_text(PICKY)
    metric = ["evaluation.metric=function", f"evaluation.metric_function={tmp_path / 'metric.py'}:picky"]
    return [recipe_file, "gate.rule=frozen", *metric, "--allow-code"]


def test_a_metric_that_fails_keeps_the_adapter_and_can_be_mended_and_repeated(
    picky: list[object], tmp_path: Path, capfd
) -> None:
    folder = tmp_path / "run"
    assert run(*picky) == 1
    talk = capfd.readouterr().err
    assert "error: the evaluation failed: picky in " in talk and "no such answer" in talk
    assert f"; the adapter that was trained is in {folder / 'adapter'}\n" in talk
    repeat = f"folora-q eval {shlex.quote(str(folder))} --allow-code"
    assert f"hint: `{repeat}` repeats the evaluation alone; `folora-q train` with --resume repeats it" in talk
    assert manifest(folder)["status"] == "failed" and "the evaluation failed" in manifest(folder)["error"]
    kept = load_file(folder / "adapter" / "adapter_model.safetensors")
    assert any(weight.any() for name, weight in kept.items() if "lora_B" in name)
    assert "Not measured" in (folder / "adapter" / "README.md").read_text("utf-8")
    assert not (folder / "evaluation.json").exists()

    (tmp_path / "metric.py").write_text("def picky(answer, reference):\n    return 0.25\n")
    assert command(*shlex.split(repeat)[1:], "--output", tmp_path / "again") == 0
    assert json.loads((tmp_path / "again" / "evaluation.json").read_text())["score"]["score"]["tuned"]["value"] == 0.25
    assert command("report", folder) == 0, "also without an evaluation"

    capfd.readouterr()
    assert run(*picky, "--resume", "--force") == 0  # the metric's file has changed
    assert "resuming from checkpoint-5" in capfd.readouterr().err
    assert manifest(folder)["status"] == "complete"
    after = load_file(folder / "adapter" / "adapter_model.safetensors")
    assert all(torch.equal(kept[name], after[name]) for name in kept)
    assert "Not measured" not in (folder / "adapter" / "README.md").read_text("utf-8")


def test_whatever_fails_in_the_evaluation_is_told_and_the_adapter_kept(
    recipe_file: Path, tmp_path: Path, capfd, monkeypatch: pytest.MonkeyPatch
) -> None:
    """As a mixture of experts did, where transformers raised in a forward pass of the evaluation alone."""

    def raising(*_: object, **__: object) -> None:
        raise RuntimeError("The size of tensor a (7) must match the size of tensor b (581)\nand more")

    monkeypatch.setattr(evaluating, "compare", raising)
    assert run(recipe_file, "gate.enabled=false") == 1
    talk = capfd.readouterr().err
    told = (
        "error: the evaluation failed: RuntimeError: The size of tensor a (7) must match the size of tensor b (581); "
    )
    assert told + "the adapter" in talk and "and more" not in talk and "Traceback" not in talk
    assert (tmp_path / "run" / "adapter" / "adapter_model.safetensors").exists()


def test_an_interrupted_evaluation_keeps_the_adapter_too(
    recipe_file: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def interrupted(*_: object, **__: object) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr(training_run, "evaluate", interrupted)
    assert run(recipe_file, "gate.enabled=false") == 130
    assert manifest(tmp_path / "run")["status"] == "interrupted"
    assert (tmp_path / "run" / "adapter" / "adapter_model.safetensors").exists()


def test_a_metric_that_never_works_is_found_before_anything_is_written(
    picky: list[object], tmp_path: Path, capfd
) -> None:
    (tmp_path / "metric.py").write_text("def picky(answer, reference):\n    return undefined\n")
    assert run(*picky) == 1
    talk = capfd.readouterr().err
    assert "error: picky in " in talk and "undefined" in talk
    assert not (tmp_path / "run").exists()
