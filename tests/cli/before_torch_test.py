"""Mistakes that a few JSON files or a stat() show are reported before PyTorch is imported."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest

from folora_q.cli.app import main

RECIPE = """\
model:
  model_name_or_path: model
data:
  train_dataset: rows.jsonl
training:
  output_dir: runs/a
"""
TURNS = {"messages": [{"role": "user", "content": "x"}, {"role": "assistant", "content": "y"}]}


@pytest.fixture(autouse=True)
def here(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "recipe.yaml").write_text(RECIPE)
    (tmp_path / "rows.jsonl").write_text(f"{json.dumps(TURNS)}\n" * 30)
    (tmp_path / "model").mkdir()
    (tmp_path / "model" / "config.json").write_text('{"model_type": "llama", "vocab_size": 8}')
    return tmp_path


def run_in(folder: Path, status: str, *checkpoints: int) -> Path:
    folder.mkdir(parents=True)
    (folder / "run.json").write_text(json.dumps({"status": status}))
    for step in checkpoints:
        (folder / f"checkpoint-{step}").mkdir()
    return folder


def fails(*arguments: object) -> None:
    with pytest.raises(SystemExit) as caught:
        main([str(argument) for argument in arguments])
    assert caught.value.code == 2


@pytest.mark.parametrize(
    ("status", "checkpoints", "message", "hint"),
    [
        (
            "interrupted",
            (40, 120),
            "already holds a run that was interrupted",
            "continue it from step 120",
        ),
        ("running", (), "already holds a run that did not finish", "add --resume to continue it;"),
        ("failed", (), "already holds a run that failed", "--overwrite deletes it"),
        ("complete", (), "already holds a run, which is complete", "hint: add --overwrite to replace it"),
    ],
)
def test_an_unfinished_run_is_offered_for_resuming_first(
    here: Path, status: str, checkpoints: tuple[int, ...], message: str, hint: str, capfd
) -> None:
    run_in(here / "runs" / "a", status, *checkpoints)
    fails("train", "recipe.yaml")
    said = capfd.readouterr().err
    assert f"error: runs/a {message}" in said and hint in said
    assert "starting PyTorch" not in said
    assert ("--resume" in said) == (status != "complete")


def test_resuming_nothing_is_an_error_that_says_where_it_looked(here: Path, capfd, monkeypatch) -> None:
    fails("train", "recipe.yaml", "--resume")
    said = capfd.readouterr().err
    assert f"error: there is no run to resume in {here / 'runs' / 'a'}\n" in said
    assert "start one without --resume" in said
    (here / "elsewhere").mkdir()
    monkeypatch.chdir(here / "elsewhere")
    fails("train", "../recipe.yaml", "--resume")
    said = capfd.readouterr().err
    assert f"{here / 'elsewhere' / 'runs' / 'a'} or {here / 'runs' / 'a'}" in said
    fails("train", "../recipe.yaml", "--resume", "training.output_dir=runs/b")
    assert f"there is no run to resume in {here / 'elsewhere' / 'runs' / 'b'}\n" in capfd.readouterr().err
    assert not (here / "elsewhere" / "runs").exists()


@pytest.mark.parametrize("recipe", ["recipe.yaml", "recipes/recipe.yaml"])
def test_a_run_is_found_from_any_folder(here: Path, recipe: str, capfd, monkeypatch) -> None:
    (here / "recipes").mkdir()
    (here / recipe).write_text(RECIPE.replace("rows", str(here / "rows")).replace(": model", f": {here / 'model'}"))
    run_in(here / "runs" / "a", "complete")
    (here / "elsewhere").mkdir()
    monkeypatch.chdir(here / "elsewhere")
    fails("train", here / recipe, "--resume")
    said = capfd.readouterr().err
    assert f"resuming the run in {here / 'runs' / 'a'}" in said
    assert f"the run in {here / 'runs' / 'a'} is complete: there is nothing to resume" in said


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ("train recipe.yaml", "already holds a run that was interrupted"),
        ("train recipe.yaml --resume training.output_dir=runs/none", "there is no run to resume in"),
        ("train recipe.yaml training.output_dir=files", "holds files that are not a run"),
        ("eval ./gone", "there is no run, adapter or model at"),
        ("eval runs/a", "the run in runs/a has no adapter: it is marked as interrupted"),
        ("chat files", "is not a run, adapter or model"),
        ("chat some-name", "the model some-name is not in the hub's cache, and HF_HUB_OFFLINE forbids"),
        ("eval some/adapter", "neither a run or adapter here nor a model that can be loaded: the model some/adapter"),
        ("merge gone", "there is no run or adapter at gone"),
        ("merge runs/a", "the run in runs/a has no adapter yet; it is marked as interrupted"),
        ("merge adapter", "adapter-merged already exists"),
        ("inspect gone", "there is no run in gone"),
        ("report gone", "there is no run in gone"),
    ],
)
def test_no_heavy_import_comes_before_these_errors(here: Path, arguments: str, message: str) -> None:
    run_in(here / "runs" / "a", "interrupted")
    (here / "files").mkdir()
    (here / "files" / "thesis.txt").write_text("years")
    (here / "adapter").mkdir()
    (here / "adapter" / "adapter_config.json").write_text('{"base_model_name_or_path": "model"}')
    (here / "adapter-merged").mkdir()
    code = (
        "import sys\nfrom folora_q.cli.app import main\n"
        f"try: main({arguments.split()!r})\nexcept SystemExit as end: assert end.code == 2, end.code\n"
        "heavy = {'torch', 'transformers', 'peft', 'datasets'} & set(sys.modules)\nassert not heavy, heavy"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, cwd=here, check=False)
    assert done.returncode == 0, done.stderr
    assert message in done.stderr
