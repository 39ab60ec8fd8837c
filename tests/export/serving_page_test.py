"""The Python of docs/serving.md, executed as it stands on a tiny trained model."""

from __future__ import annotations

import re
from pathlib import Path

import pytest
import torch

from folora_q.cli.app import main
from folora_q.models.hardware import choose_hardware
from folora_q.models.load import load_model
from folora_q.recipe.load import load_recipe

PAGE = Path(__file__).parents[2] / "docs" / "serving.md"


def python_blocks() -> list[str]:
    return re.findall(r"^```python\n(.*?)^```$", PAGE.read_text("utf-8"), re.MULTILINE | re.DOTALL)


def run(*arguments: object) -> None:
    with pytest.raises(SystemExit) as caught:
        main([str(argument) for argument in arguments])
    assert caught.value.code == 0


def test_the_pages_python_loads_and_asks_the_model(recipe_file: Path, tmp_path: Path, monkeypatch, capsys) -> None:
    monkeypatch.chdir(tmp_path)
    quick = ["evaluation.metric=none", "gate.enabled=false", "training.learning_rate=0.02", "training.max_steps=40"]
    run("train", recipe_file, *quick, "training.output_dir=runs/my")
    run("merge", "runs/my", "--dtype", "float32", "--no-verify")
    load, ask, load_merged = python_blocks()
    capsys.readouterr()
    adapter: dict = {}
    exec(load, adapter)
    exec(ask, adapter)
    merged = dict(adapter)
    exec(load_merged, merged)
    exec(ask.replace("runs/my/adapter", "runs/my/merged"), merged)
    first, second = capsys.readouterr().out.splitlines()
    assert first == second and first.startswith("it is"), "what it was trained to say"
    assert merged["model"] is not adapter["model"]
    ids = adapter["prompt"]["input_ids"]
    base = load_model(load_recipe(recipe_file).model, choose_hardware("float32")).model
    with torch.no_grad():
        tuned, whole, bare = (model(ids).logits.float() for model in (adapter["model"], merged["model"], base))
        with adapter["model"].disable_adapter():
            without = adapter["model"](ids).logits.float()
    effect = (tuned - bare).abs().mean()
    assert (without - bare).abs().mean() < 0.05 * effect, "the base in 4 bits, up to computing in bfloat16"
    assert (tuned - whole).abs().mean() < 0.05 * effect
