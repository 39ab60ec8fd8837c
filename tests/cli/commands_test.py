"""The commands around a recipe, as a person types them: init, recipes, validate, schema."""

from __future__ import annotations

import json
import os
import pty
import re
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import rich_click as click

from folora_q.cli import app
from folora_q.cli.app import COMMANDS, main
from folora_q.data.formats import FORMATS
from folora_q.recipe import load_recipe
from folora_q.recipe.json_schema import json_schema
from folora_q.recipe.new import SIZES, Answers, new_recipe
from folora_q.recipe.shipped import recipes_folder, shipped_recipes
from tests.data.rows import assistant, user, write_jsonl


def run(*arguments: object) -> int:
    with pytest.raises(SystemExit) as caught:
        main([str(argument) for argument in arguments])
    return caught.value.code


@pytest.fixture
def data(tmp_path: Path) -> Path:
    return write_jsonl(tmp_path / "my.jsonl", [{"messages": [user(str(i)), assistant("yes")]} for i in range(30)])


@pytest.mark.parametrize("name", [*COMMANDS, "recipes copy"])
def test_every_command_explains_itself(name: str, capfd) -> None:
    assert run(*name.split(), "--help") == 0
    assert f"folora-q {name}" in capfd.readouterr().out


def test_a_misspelt_command_is_answered_with_the_nearest(capfd) -> None:
    assert run("vlidate") == 2
    assert "No such command 'vlidate'. Did you mean 'validate'?" in capfd.readouterr().err


def test_the_schema_is_data_alone(capfd) -> None:
    assert run("schema") == 0
    assert capfd.readouterr() == (json_schema(), "")


# validate


def test_a_valid_recipe_is_told_in_short(recipe_file: Path, tmp_path: Path, capfd) -> None:
    assert run("validate", recipe_file) == 0
    text = capfd.readouterr().out
    assert f"✓ {recipe_file} is valid" in text
    assert f"{tmp_path / 'train.jsonl'}: 12 rows of `messages`" in text
    assert "5 steps of 4 sequences up to 1,024 tokens; learning rate 0.01, optimizer by hardware" in text
    assert "step at a_start, a_step, b_step; λ = 64" in text
    assert not (tmp_path / "run").exists()
    assert not (tmp_path / "cache").exists()


def test_overrides_come_in_three_ways_and_the_last_wins(recipe_file: Path, capfd) -> None:
    assert run("validate", recipe_file, "learning_rate=1", "training.max_steps=9", "--set", "learning_rate=2e-5") == 0
    assert "9 steps of 4 sequences up to 1,024 tokens; learning rate 2e-05" in capfd.readouterr().out


def test_only_the_first_rows_are_read_unless_all_are_asked_for(recipe_file: Path, tmp_path: Path, capfd) -> None:
    rows = [{"messages": [user(str(i)), assistant("yes")]} for i in range(1500)]
    rows[1200] = {"messages": [user("x")]}
    path = write_jsonl(tmp_path / "train.jsonl", rows)
    assert run("validate", recipe_file) == 0
    assert "the first 1,000 rows, of `messages`" in capfd.readouterr().out
    assert run("validate", recipe_file, "--all-rows") == 2
    assert f"error: {path} line 1201: `messages` has no assistant turn" in capfd.readouterr().err


@pytest.mark.parametrize(
    ("override", "message"),
    [
        ("data.chat_template=chatmll", "no template named 'chatmll'; did you mean chatml?"),
        ("data.train_dataset=trian.jsonl", "trian.jsonl; did you mean train.jsonl?"),
        ("data.train_dataset=*.csv", "no file matches"),
        ("model.attn_implementation=flash_attention_3", "flash_attention_3 needs the package flash_attn_interface"),
        ("logging.report_to=[clearml]", "clearml needs the package clearml, which is not installed"),
        ("training.load_best_model_at_end=true", "needs measurements during training: set evaluation.steps"),
        ("training.packing=perhaps", "`training.packing`"),
        ("gate.rule=[step]", "`gate.rule`"),
    ],
)
def test_what_cannot_work_is_found_without_a_model(
    recipe_file: Path, override: str, message: str, capfd, monkeypatch
) -> None:
    monkeypatch.chdir(recipe_file.parent)
    assert run("validate", recipe_file, override) == 2
    talk = capfd.readouterr().err
    assert talk.startswith("error: ") and message in talk


def test_a_hub_dataset_is_not_looked_at(recipe_file: Path, capfd) -> None:
    changes = ["data.train_dataset={path: org/name, split: 'train[:5%]'}", "data.eval_dataset=null"]
    assert run("validate", recipe_file, *changes) == 0
    assert "org/name (train[:5%]) from the hub, not checked" in capfd.readouterr().out


def test_a_run_that_is_there_is_mentioned(recipe_file: Path, tmp_path: Path, capfd) -> None:
    (tmp_path / "run").mkdir()
    (tmp_path / "run" / "run.json").write_text("{}")
    assert run("validate", recipe_file) == 0
    assert "already holds a run: --overwrite" in capfd.readouterr().out


# recipes


def test_every_shipped_recipe_is_listed_with_its_memory_and_title(capfd) -> None:
    assert run("recipes") == 0
    lines = capfd.readouterr().out.splitlines()
    for recipe in shipped_recipes():
        assert recipe.title
        said = re.search(r"(?:`folora-q estimate`|--gpu 24) says ([\d.]+ GiB)", recipe.path.read_text("utf-8"))
        memory = said[1] if said else "1.1 GiB"  # the demo names none
        assert any(line.split() == f"{recipe.name} {memory} {recipe.title}".split() for line in lines)


def test_a_copied_recipe_works_where_it_lies(tmp_path: Path, capfd) -> None:
    assert run("recipes", "copy", "demo", tmp_path / "new" / "mine.yaml") == 0
    assert run("validate", tmp_path / "new" / "mine.yaml") == 0
    assert f"{tmp_path / 'new' / 'demo' / 'train.jsonl'}: the first 1,000 rows" in capfd.readouterr().out
    assert (tmp_path / "new" / "recipe.schema.json").read_text("utf-8") == json_schema()
    assert (tmp_path / "new" / "mine.yaml").read_bytes() == (recipes_folder() / "demo.yaml").read_bytes()


def test_copying_replaces_nothing_unless_told(tmp_path: Path, capfd) -> None:
    (tmp_path / "qlora-baseline.yaml").write_text("mine")
    assert run("recipes", "copy", "qlora-baseline", tmp_path) == 2
    assert "already exists" in capfd.readouterr().err
    assert (tmp_path / "qlora-baseline.yaml").read_text() == "mine"
    assert sorted(path.name for path in tmp_path.iterdir()) == ["qlora-baseline.yaml"]
    assert run("recipes", "copy", "qlora-baseline", tmp_path, "--overwrite") == 0
    assert (tmp_path / "qlora-baseline.yaml").read_text() != "mine"


def test_a_misspelt_recipe_is_answered_with_the_nearest(tmp_path: Path, capfd) -> None:
    assert run("recipes", "copy", "dem", tmp_path) == 2
    assert "there is no recipe named dem; did you mean demo?" in capfd.readouterr().err


# init


def test_init_writes_a_recipe_that_validates(data: Path, tmp_path: Path, capfd) -> None:
    path = tmp_path / "deep" / "mine.yaml"
    assert run("init", path, "--data", data, "--gpu", "12", "--model", "org/model", "--output-dir", "runs/x y") == 0
    recipe = load_recipe(path)
    assert recipe.data.train_dataset[0].path == str(data)
    assert "../my.jsonl" in path.read_text("utf-8"), "relative to the recipe"
    assert (recipe.model.model_name_or_path, recipe.training.output_dir) == ("org/model", "runs/x y")
    assert (path.parent / "recipe.schema.json").read_text("utf-8") == json_schema()
    assert run("validate", path) == 0
    assert f"folora-q preview {path}" in capfd.readouterr().out


def test_init_replaces_nothing_and_asks_nobody_who_is_not_there(data: Path, tmp_path: Path, capfd, monkeypatch) -> None:
    path = tmp_path / "recipe.yaml"
    with open(os.devnull) as nobody:
        monkeypatch.setattr(sys, "stdin", nobody)
        assert run("init", path) == 2
        assert "--data is required without a terminal" in capfd.readouterr().err
        assert run("init", path, "--data", data) == 0, "the rest has defaults"
        assert run("init", path, "--data", data) == 2
    assert "already exists" in capfd.readouterr().err


def test_init_finds_mistakes_in_the_data_before_it_writes(tmp_path: Path, capfd) -> None:
    broken = tmp_path / "broken.jsonl"
    broken.write_text('{"messages": [\n')
    assert run("init", tmp_path / "recipe.yaml", "--data", broken, "--gpu", "8") == 2
    assert "broken.jsonl line 1: it is not JSON" in capfd.readouterr().err
    assert not (tmp_path / "recipe.yaml").exists()


def test_init_asks_in_a_terminal(data: Path, tmp_path: Path) -> None:
    parent, child = pty.openpty()
    process = subprocess.Popen(
        [sys.executable, "-m", "folora_q", "init", "asked.yaml"], stdin=child, stdout=child, stderr=child, cwd=tmp_path
    )
    os.close(child)
    os.write(parent, b"my.jsonl\n\n24\n\n")  # data, the default model, the card, the default folder
    assert process.wait(timeout=60) == 0
    talk = os.read(parent, 100_000).decode()
    os.close(parent)
    assert "Your data" in talk and "Memory of your GPU" in talk
    recipe = load_recipe(tmp_path / "asked.yaml")
    assert recipe.training.output_dir == "runs/asked"
    assert recipe.training.per_device_train_batch_size == SIZES["24"][0]


@pytest.mark.parametrize("shape", FORMATS)
@pytest.mark.parametrize("card", SIZES)
def test_a_first_recipe_loads_for_every_shape_and_card(shape: str, card: str, tmp_path: Path) -> None:
    (tmp_path / "d: #.jsonl").write_text("{}\n")
    path = tmp_path / "r.yaml"
    path.write_text(new_recipe(Answers("org/m", "d: #.jsonl", shape, card, "runs/a: b")), encoding="utf-8")
    recipe = load_recipe(path)
    assert recipe.training.output_dir == "runs/a: b"
    assert recipe.training.packing == (shape == "text") == (recipe.data.overlong == "split")
    assert recipe.training.activation_checkpointing == ("auto" if card != "cpu" else False)
    assert all(len(line) <= 160 and not line.endswith(" ") for line in path.read_text("utf-8").splitlines())
    assert json.loads(json_schema())["properties"].keys() >= load_recipe(path).model_dump().keys()


def test_ctrl_c_that_a_library_turns_into_its_own_error_is_still_an_interrupt(monkeypatch, capfd) -> None:
    @click.command()
    def command() -> None:
        try:
            os.kill(os.getpid(), signal.SIGINT)
            time.sleep(10)
        except KeyboardInterrupt:  # as torch.tensor() does when it asks an object for its length
            raise ValueError("could not determine the shape") from None

    monkeypatch.setattr(app.group, "get_command", lambda ctx, name: command)
    assert run("doctor") == 130
    assert "error: interrupted" in capfd.readouterr().err
    assert signal.getsignal(signal.SIGINT) is signal.default_int_handler
