"""`folora-q init` understands the user's files: columns, number of rows, and answers that need correcting."""

from __future__ import annotations

import csv
import json
import os
import pty
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from folora_q.cli.app import main
from folora_q.recipe import Recipe, load_recipe

USER = {"role": "user", "content": "a"}


def run(*arguments: object) -> int:
    with pytest.raises(SystemExit) as caught:
        main([str(argument) for argument in arguments])
    return caught.value.code


@pytest.fixture(autouse=True)
def here(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    monkeypatch.chdir(tmp_path)
    with open(os.devnull) as nothing:
        monkeypatch.setattr(sys, "stdin", nothing)
        yield tmp_path


def write(name: str, columns: str, rows: int = 200) -> str:
    names = columns.split()
    table = [{column: f"{column} {number}" for column in names} for number in range(rows)]
    with Path(name).open("w", encoding="utf-8", newline="") as file:
        if name.endswith(".jsonl"):
            file.writelines(json.dumps(row) + "\n" for row in table)
        else:
            writer = csv.DictWriter(file, names, delimiter="\t" if name.endswith(".tsv") else ",")
            writer.writeheader()
            writer.writerows(table)
    return name


def written(*arguments: object) -> Recipe:
    assert run("init", "r.yaml", "--overwrite", "--gpu", "12", *arguments) == 0
    return load_recipe(Path("r.yaml"))


@pytest.mark.parametrize("ending", ["jsonl", "csv", "tsv"])
@pytest.mark.parametrize(
    ("columns", "fields"),
    [
        ("question answer", {"instruction": "question", "output": "answer"}),
        ("query reply", {"instruction": "query", "output": "reply"}),
        ("input response", {"instruction": "input", "output": "response"}),
        ("content", {"text": "content"}),
        ("prompt completion", {}),
        ("instruction output", {}),
    ],
)
def test_common_columns_are_understood(ending: str, columns: str, fields: dict[str, str], capfd) -> None:
    recipe = written("--data", write(f"rows.{ending}", columns))
    assert recipe.data.train_dataset[0].fields == fields
    assert run("validate", "r.yaml") == 0
    told = capfd.readouterr().out
    assert all(f"`{column}`" in told for column in fields.values())


@pytest.mark.parametrize(
    ("columns", "fields"),
    [
        ("prompt chosen rejected", {"instruction": "prompt"}),
        ("system question chosen rejected", {"instruction": "question"}),
        ("instruction input chosen rejected", {}),
        ("chosen rejected", {}),
    ],
)
def test_pairs_are_for_dpo(columns: str, fields: dict[str, str], capfd) -> None:
    recipe = written("--data", write("rows.jsonl", columns))
    assert recipe.training.objective == "dpo" and recipe.data.train_dataset[0].fields == fields
    assert "`chosen` is preferred to `rejected`" in capfd.readouterr().out
    assert run("validate", "r.yaml") == 0
    assert "pairs of answers" in capfd.readouterr().out


@pytest.mark.parametrize(
    ("row", "fields"),
    [
        ({"prompt": "a", "completion": "b", "label": True}, {"instruction": "prompt", "output": "completion"}),
        ({"instruction": "a", "output": "b", "kto_tag": False}, {}),
        ({"prompt": [USER], "completion": [{"role": "assistant", "content": "b"}], "label": False}, {}),
    ],
)
def test_answers_with_a_label_are_for_kto(row: dict[str, Any], fields: dict[str, str], capfd) -> None:
    Path("rows.jsonl").write_text("".join(json.dumps(row) + "\n" for _ in range(200)))
    recipe = written("--data", "rows.jsonl")
    assert recipe.training.objective == "kto" and recipe.data.train_dataset[0].fields == fields
    assert "a label says whether" in capfd.readouterr().out
    assert run("validate", "r.yaml") == 0
    assert "of `labelled`" in capfd.readouterr().out


def test_the_length_of_the_run_follows_from_the_number_of_rows(capfd) -> None:
    recipe = written("--data", write("rows.jsonl", "question answer", 60))
    training = recipe.training
    assert (recipe.data.eval_size, training.num_train_epochs, training.gradient_accumulation_steps) == (12, 9, 4)
    assert recipe.evaluation.steps == 25
    assert "60 rows, 12 of them held out; 9 epochs in batches of 4: 108 steps" in capfd.readouterr().out


def test_columns_that_are_not_clear_are_asked_for_with_the_options_that_answer(capfd) -> None:
    write("rows.csv", "left right")
    assert run("init", "r.yaml", "--data", "rows.csv") == 2
    told = capfd.readouterr().err
    assert "could be meant in several ways: left, right" in told
    assert "add --field=instruction=left --field=output=right" in told
    recipe = written("--data", "rows.csv", "--field=instruction=right", "--field=output=left")
    assert recipe.data.train_dataset[0].fields == {"instruction": "right", "output": "left"}


def test_a_wrong_field_is_refused(capfd) -> None:
    assert run("init", "r.yaml", "--data", write("rows.csv", "a b"), "--field", "answer=b") == 2
    assert "cannot read --field 'answer=b'" in capfd.readouterr().err


@pytest.mark.parametrize("name", ["gone.csv", "data/gone.jsonl", "gone.parquet", "gone.jsonl.gz"])
def test_a_missing_file_is_missing_and_not_a_hub_id(name: str, here: Path, capfd) -> None:
    assert run("init", "r.yaml", "--data", name) == 2
    assert f"error: no file at {here / name}" in capfd.readouterr().err


@pytest.mark.parametrize(
    ("text", "passes"), [("12GB", 1), ("12 gb", 1), ("12gb", 1), ("12 GiB", 1), ("13", 1), ("80GB", 4), ("CPU", 2)]
)
def test_a_card_may_be_written_in_any_way(text: str, passes: int) -> None:
    write("rows.jsonl", "question answer")
    assert written("--data", "rows.jsonl", "--gpu", text).training.per_device_train_batch_size == passes


@pytest.mark.parametrize("text", ["big", "6", "-", "12MB"])
def test_another_card_is_refused(text: str, capfd) -> None:
    assert run("init", "r.yaml", "--data", write("rows.jsonl", "question answer"), "--gpu", text) == 2
    assert "GB" in capfd.readouterr().err


def test_a_local_model_is_named_relative_to_the_recipe(here: Path) -> None:
    (here / "models" / "tiny").mkdir(parents=True)
    (here / "models" / "tiny" / "config.json").write_text("{}")
    write("rows.jsonl", "question answer")
    assert run("init", "deep/r.yaml", "--data", "rows.jsonl", "--gpu", "12", "--model", "models/tiny") == 0
    assert load_recipe(Path("deep/r.yaml")).model.model_name_or_path == str(here / "models" / "tiny")


def in_a_terminal(here: Path, answers: str) -> str:
    parent, child = pty.openpty()
    command = [sys.executable, "-m", "folora_q", "init", "asked.yaml"]
    process = subprocess.Popen(command, stdin=child, stdout=child, stderr=child, cwd=here)
    os.close(child)
    os.write(parent, answers.encode())
    said = b""
    while True:
        try:
            part = os.read(parent, 65536)
        except OSError:  # the other end is closed
            break
        said += part
    os.close(parent)
    assert process.wait(timeout=60) == 0, said
    return said.decode()


def test_a_wrong_answer_is_asked_for_again_and_no_other(here: Path) -> None:
    write("my.csv", "question answer")
    talk = in_a_terminal(here, "mine.csv\nmy.csv\n./gone\n\nbig\n12 gb\n\n")
    assert f"no file at {here / 'mine.csv'}; did you mean my.csv?" in talk
    assert f"no model at {here / 'gone'}" in talk
    assert "'big' is not a memory size" in talk
    assert talk.count("Your data") == talk.count("Model [") == talk.count("Memory of your GPU") == 2
    assert talk.count("Run folder [") == 1
    assert load_recipe(here / "asked.yaml").data.train_dataset[0].fields == {
        "instruction": "question",
        "output": "answer",
    }


def test_columns_that_are_not_clear_are_asked_for_in_a_terminal(here: Path) -> None:
    write("my.csv", "left right")
    talk = in_a_terminal(here, "my.csv\nn\nright\nleft\n\n12\n\n")
    assert "Is it right that the question is `left` and the answer `right`?" in talk
    assert load_recipe(here / "asked.yaml").data.train_dataset[0].fields == {"instruction": "right", "output": "left"}
