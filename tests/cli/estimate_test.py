"""`folora-q estimate`, as a person types it."""

from __future__ import annotations

import json
import shlex
from pathlib import Path

import pytest

from folora_q.cli.app import main
from folora_q.recipe.shipped import recipes_folder
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


def test_a_card_that_nothing_helps(model: str, capfd) -> None:
    assert run("estimate", RECIPE, model, "--gpu", 4) == 1
    assert "use a smaller model, or a larger card" in capfd.readouterr().out


def test_a_family_that_is_not_in_the_table_takes_longer_and_says_so(tmp_path: Path, capfd) -> None:
    (tmp_path / "config.json").write_text(json.dumps(SMALL_LLAMA | {"model_type": "stablelm"}), encoding="utf-8")
    assert run("estimate", RECIPE, f"model.model_name_or_path={tmp_path}") == 0
    captured = capfd.readouterr()
    assert "models of the type stablelm are not in our table" in captured.err
    assert "peak" in captured.out


def test_a_model_that_is_not_here(capfd) -> None:
    assert run("estimate", RECIPE, "model.model_name_or_path=nobody/nothing") == 2
    assert "the model nobody/nothing is not in the hub's cache" in capfd.readouterr().err
