"""`folora-q estimate`, as a person types it."""

from __future__ import annotations

import json
import shlex
from pathlib import Path

import pytest

from folora_q.cli.app import main
from folora_q.recipe.shipped import ShippedRecipe, recipes_folder, shipped_recipes
from tests.memory.recipes import MISTRAL_7B, SMALL_LLAMA

RECIPE = recipes_folder() / "7b-8gb-math.yaml"


def run(*arguments: object) -> int:
    with pytest.raises(SystemExit) as caught:
        main([str(argument) for argument in arguments])
    return caught.value.code


@pytest.fixture
def model(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> str:
    """An override that names a folder with nothing in it but Mistral 7B's config.json."""
    monkeypatch.setattr("folora_q.cli.console.out.width", 80)
    (tmp_path / "config.json").write_text(json.dumps(MISTRAL_7B), encoding="utf-8")
    return f"model.model_name_or_path={tmp_path}"


def test_without_a_card_it_says_which_fit(model: str, capfd) -> None:
    assert run("estimate", RECIPE, model, "gate.batch_size=16") == 0
    text = capfd.readouterr().out
    assert "7.25 billion parameters, 96% in 4 bits; 44.0 million trained" in text
    assert " 24 GB " in text and "fits, " in text
    for name in ("4-bit weights", "gradients", "sketches", "KV cache", "CUDA context", "host memory", "disk"):
        assert name in text
    tables = [line for line in text.splitlines() if not line.startswith(str(model))][1:]
    assert max(len(line) for line in tables if "/" not in line) <= 80


def test_a_card_that_is_large_enough(model: str, capfd) -> None:
    assert run("estimate", RECIPE, model, "--gpu", 24) == 0
    text = capfd.readouterr().out
    assert " 24 GB " in text and " 8 GB " not in text
    assert "To fit" not in text


def test_a_card_that_is_too_small_gets_advice_that_can_be_pasted(model: str, capfd) -> None:
    large = ["training.activation_checkpointing=false", "training.max_length=2048"]
    assert run("estimate", RECIPE, model, *large, "--gpu", 8) == 1
    text = capfd.readouterr().out
    assert "does not fit" in text
    assert "training.activation_checkpointing=true" in text
    given = text.splitlines()[-1].split()[3:]
    assert large[0] not in given and large[1] in given  # what is changed is not said twice
    assert run("estimate", RECIPE, *given, "--gpu", 8) == 0


def test_a_list_in_the_advice_can_be_pasted_too(model: str, capfd) -> None:
    assert run("estimate", RECIPE, model, "gate.rule=step", "training.max_length=4096", "--gpu", 6) == 1
    line = capfd.readouterr().out.splitlines()[-1]
    assert "gate.places='[a_start]'" in line
    assert run("estimate", RECIPE, *shlex.split(line)[3:], "--gpu", 6) == 0


def test_of_several_gpus_each_computes_a_part_of_a_step(model: str, capfd) -> None:
    fixed = ["training.per_device_train_batch_size=4", "training.gradient_accumulation_steps=4"]
    assert run("estimate", RECIPE, model, *fixed, "--gpu", 24, "--gpus", 2) == 0
    text = capfd.readouterr().out
    assert "on each of 2 GPUs" in text
    assert "8 sequences at a time" in text and "16 sequences" not in text
    assert run("estimate", RECIPE, model, *fixed, "--gpus", 3) == 2
    assert "the 16 rows of a step" in capfd.readouterr().err


def test_advice_for_several_gpus_is_about_the_steps_of_all(model: str, capfd) -> None:
    fixed = ["training.per_device_train_batch_size=8", "training.gradient_accumulation_steps=2"]
    large = [*fixed, "training.max_length=4096", "training.auto_batch_size=false"]
    assert run("estimate", RECIPE, model, *large, "--gpu", 8, "--gpus", 2) == 1
    line = capfd.readouterr().out.splitlines()[-1].strip()
    assert line.startswith("torchrun --nproc-per-node 2 -m folora_q train ")
    given = dict(word.split("=", 1) for word in shlex.split(line)[6:] if "=" in word)
    rows, passes = (
        int(given[f"training.{key}"]) for key in ("per_device_train_batch_size", "gradient_accumulation_steps")
    )
    assert rows * passes == 16


def test_a_card_that_nothing_helps(model: str, capfd) -> None:
    assert run("estimate", RECIPE, model, "--gpu", 4) == 1
    assert "use a smaller model, or a larger card" in capfd.readouterr().out


def test_a_family_that_is_not_in_the_table_takes_longer_and_says_so(tmp_path: Path, capfd) -> None:
    (tmp_path / "config.json").write_text(json.dumps(SMALL_LLAMA | {"model_type": "stablelm"}), encoding="utf-8")
    assert run("estimate", RECIPE, f"model.model_name_or_path={tmp_path}") == 0
    captured = capfd.readouterr()
    assert "models of the type stablelm are not in our table" in captured.err
    assert "peak" in captured.out


@pytest.mark.parametrize("recipe", shipped_recipes(), ids=lambda recipe: recipe.name)
def test_every_shipped_recipe_is_answered_without_network_and_data(recipe: ShippedRecipe, capfd) -> None:
    options = [] if recipe.cards is None else ["--gpus", recipe.cards[0], "--gpu", recipe.cards[1]]
    assert run("estimate", recipe.path, *options) == 0
    lines = capfd.readouterr().out.splitlines()
    notes = [line for line in lines if "shipped numbers are used (" in line]
    assert len(notes) == (recipe.name != "demo")  # its file is known by its hash
    peak = next(line for line in lines if line.startswith("peak"))
    assert run("recipes") == 0
    listed = next(line for line in capfd.readouterr().out.splitlines() if line.startswith(f"{recipe.name} "))
    assert listed.split()[1] == f"{max(map(float, peak.split()[1:])):.1f}" and listed.split()[2] == "GiB"


def test_data_that_are_not_here_are_no_error_but_a_template_is(tmp_path: Path, capfd) -> None:
    text = RECIPE.read_text("utf-8").replace("evaluation:\n", "evaluation:\n  general_text: mine.txt\n", 1)
    path = tmp_path / "mine.yaml"
    path.write_text(text, encoding="utf-8")
    mine = ["data.train_dataset=mine.jsonl", "data.eval_dataset=held.jsonl"]
    assert run("estimate", path, *mine) == 0
    assert run("estimate", path, *mine, "data.chat_template=mine.jinja") == 2
    assert "no file at" in (said := capfd.readouterr().err) and "mine.jinja" in said and "mine.jsonl" not in said
    assert run("validate", path, *mine) == 2
    said = capfd.readouterr().err
    assert "mine.jsonl" in said and "held.jsonl" in said and "mine.txt" in said


def test_a_model_that_is_not_here(capfd) -> None:
    assert run("estimate", RECIPE, "model.model_name_or_path=nobody/nothing") == 2
    assert "the model nobody/nothing is not in the hub's cache" in capfd.readouterr().err
