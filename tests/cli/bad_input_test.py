"""Bad data through the command line: one error that names the file and the line, and nothing left behind."""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest

from folora_q.cli.app import main

GOOD = {"messages": [{"role": "user", "content": "say 1"}, {"role": "assistant", "content": "it is 1"}]}
GOOD_LINE = json.dumps(GOOD)
TURN = "<|im_start|>{{ m.role }}\n{{ m.content }}<|im_end|>\n"
ASK = "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
REFUSES_7 = (
    "{% for m in messages %}{% if '7' in m.content %}{{ raise_exception('no 7') }}{% endif %}" + TURN + "{% endfor %}"
)


def run(*arguments: object) -> int:
    with pytest.raises(SystemExit) as caught:
        main([str(argument) for argument in arguments])
    return caught.value.code


def lines(*bad: str, good: int = 3) -> bytes:
    """Good lines, then these."""
    return "\n".join([GOOD_LINE] * good + list(bad)).encode()


def chat(*turns: tuple[str, object]) -> str:
    return json.dumps({"messages": [{"role": role, "content": content} for role, content in turns]})


# Name: the file, what it holds, overrides, what the error says.
BAD_FILES: dict[str, tuple[str, bytes, list[str], str]] = {
    "broken JSON": (
        "train.jsonl",
        lines('{"messages": [}', GOOD_LINE, good=4710),
        [],
        "{path} line 4711: it is not JSON: Expecting value at column 15",
    ),
    "wrong encoding": (
        "train.jsonl",
        lines(GOOD_LINE.replace("say", "é"), good=2).decode().encode("latin-1"),
        [],
        "{path} line 3: it is not UTF-8 text: byte 43 is 0xe9",
    ),
    "UTF-16": ("train.jsonl", GOOD_LINE.encode("utf-16"), [], "{path} is UTF-16 text"),
    "empty file": ("train.jsonl", b"", [], "{path} holds no rows"),
    "header alone": ("train.csv", b"prompt,completion\n", [], "{path} holds no rows"),
    "unknown columns": (
        "train.csv",
        b"question,answer\n1,2\n",
        [],
        "{path} line 2: its columns (answer, question) match no known format",
    ),
    "missing column": (
        "train.jsonl",
        b'{"prompt": "1", "completion": "2"}\n{"completion": "2"}\n',
        ["data.train_dataset.shape=prompt_completion"],
        "{path} line 2: the column `prompt` is missing; the columns are completion",
    ),
    "mapped column missing": (
        "train.csv",
        b"question,reply\n1,2\n",
        ["data.train_dataset.fields={prompt: question, completion: answer}"],
        "{path} line 2: the column `answer` is missing; the columns are question, reply",
    ),
    "mixed shapes": (
        "train.jsonl",
        lines('{"text": "x"}'),
        [],
        "{path} line 4: its columns are those of `text`, but the rows before it are `messages`",
    ),
    "stray quote": (
        "train.csv",
        b'prompt,completion\n1,"two\nlines"\n3,"four\n5,six\n',
        [],
        "{path} line 4: a quote is not closed here, or is in the middle of a field (unexpected end of data)",
    ),
    "too many fields": (
        "train.tsv",
        b"prompt\tcompletion\n1\t2\n3\t4\t5\n",
        [],
        "{path} line 3: it has 3 fields, but the header has 2",
    ),
    "roles out of order": (
        "train.jsonl",
        lines(chat(("assistant", "yo"), ("user", "hi"))),
        [],
        "{path} line 4: roles out of order: `messages[0]` is an assistant turn before any user turn",
    ),
    "null content": (
        "train.jsonl",
        lines(chat(("user", "hi"), ("assistant", None))),
        [],
        "{path} line 4: `messages[1].content` is null",
    ),
    "not a list": ("train.json", b"5", [], "{path} must hold a list of objects, not a number"),
    "no parquet": ("train.parquet", b"PAR1", [], "{path} is not a parquet file that can be read: "),
    "unknown ending": ("train.xlsx", b"PK", [], "cannot read {path}: its ending is not one of .jsonl, "),
    "bad row for evaluation": (
        "heldout.jsonl",
        lines(chat(("user", "hi"))),
        [],
        "{path} line 4: `messages` has no assistant turn, so there is nothing to train",
    ),
}


@pytest.fixture
def broken(recipe_file: Path, tmp_path: Path) -> Callable[[str], tuple[list[object], str]]:
    """Puts a bad file beside the recipe; the arguments to read it, and what the error begins with."""

    def broken(case: str) -> tuple[list[object], str]:
        name, content, overrides, message = BAD_FILES[case]
        (tmp_path / name).write_bytes(content)
        if not name.startswith("heldout"):
            overrides = [f"data.train_dataset={tmp_path / name}", *overrides]
        return [recipe_file, *overrides], message.format(path=tmp_path / name)

    return broken


def errors(talk: str) -> list[str]:
    assert "Traceback" not in talk
    return [line.removeprefix("error: ") for line in talk.splitlines() if line.startswith("error:")]


@pytest.mark.parametrize("case", BAD_FILES)
def test_bad_data_end_a_run_with_one_error_and_leave_nothing(broken, tmp_path: Path, capfd, case: str) -> None:
    arguments, message = broken(case)
    assert run("train", *arguments) == 2
    text, talk = capfd.readouterr()
    [error] = errors(talk)
    assert error.startswith(message) and not text
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize("case", BAD_FILES)
def test_validation_finds_the_same_without_a_run(broken, tmp_path: Path, capfd, case: str) -> None:
    arguments, message = broken(case)
    assert run("validate", *arguments, "--all-rows") == 2
    text, talk = capfd.readouterr()
    [error] = errors(talk)
    assert error.startswith(message) and not text
    assert talk.startswith("error: ")


def test_validation_looks_at_the_beginning_unless_told_otherwise(broken, capfd) -> None:
    arguments, _ = broken("broken JSON")
    assert run("validate", *arguments) == 0
    assert "train.jsonl: the first 1,000 rows, of `messages`" in capfd.readouterr().out


def test_bad_data_leave_an_earlier_run_alone(broken, tmp_path: Path) -> None:
    (tmp_path / "run").mkdir()
    (tmp_path / "run" / "run.json").write_text('{"status": "complete"}')
    arguments, _ = broken("null content")
    assert run("train", *arguments, "--overwrite") == 2
    assert (tmp_path / "run" / "run.json").read_text() == '{"status": "complete"}'


MINE = r"the chat template \S+/mine\.jinja "


@pytest.mark.parametrize(
    ("template", "message"),
    [
        (
            "{{ raise_exception('no thanks') }}",
            MINE + "fails on a question and an answer: no thanks",
        ),
        (
            "{% for m in messages %}\n{{ m. }}{% endfor %}",
            MINE + "is not valid Jinja: .*, line 2",
        ),
        ("{% for m in messages %}\n{{ m.role }}", MINE + "is not valid Jinja: "),
        (
            "{{ messages[0].role.nothing.at_all }}",
            MINE + "fails on a question and an answer: ",
        ),
        ("{{ 1 / 0 }}", MINE + "fails on a question and an answer: division by zero"),
        ("nothing", "the chat template "),
        (REFUSES_7 + ASK, r"\S*/train\.jsonl line 8: it cannot be rendered: no 7"),
    ],
    ids=["raises", "syntax", "no end", "undefined", "arithmetic", "constant", "refuses a row"],
)
def test_a_bad_chat_template_ends_a_run_with_one_error_and_no_adapter(
    recipe_file: Path, tmp_path: Path, capfd, template: str, message: str
) -> None:
    (tmp_path / "mine.jinja").write_text(template)
    assert run("train", recipe_file, f"data.chat_template={tmp_path / 'mine.jinja'}") == 2
    text, talk = capfd.readouterr()
    [error] = errors(talk)
    assert re.match(message, error) and not text
    assert not (tmp_path / "run").exists()


def test_a_bad_chat_template_is_named(recipe_file: Path, tmp_path: Path, capfd) -> None:
    (tmp_path / "mine.jinja").write_text("{{ }}")
    assert run("train", recipe_file, f"data.chat_template={tmp_path / 'mine.jinja'}") == 2
    assert "mine.jinja" in capfd.readouterr().err


@pytest.mark.parametrize("content", [b"\xff", b"{{ '\xe9' }}"])
def test_a_template_that_is_not_utf_8_is_found_by_validation_too(
    recipe_file: Path, tmp_path: Path, capfd, content: bytes
) -> None:
    (tmp_path / "mine.jinja").write_bytes(content)
    for command in ("validate", "train"):
        assert run(command, recipe_file, f"data.chat_template={tmp_path / 'mine.jinja'}") == 2
        [error] = errors(capfd.readouterr().err)
        assert error.startswith(f"`data.chat_template`: cannot read {tmp_path / 'mine.jinja'}: ")


def test_debug_shows_where_it_happened(broken) -> None:
    arguments, message = broken("null content")
    command = [sys.executable, "-m", "folora_q", "validate", *map(str, arguments), "--debug"]
    done = subprocess.run(command, capture_output=True, text=True, env=os.environ, timeout=60)
    assert done.returncode == 1
    assert "Traceback" in done.stderr and f"RowError: {message}" in done.stderr


def test_skipping_trains_past_rows_that_cannot_be_used_and_lists_them(recipe_file: Path, tmp_path: Path, capfd) -> None:
    rows = (tmp_path / "train.jsonl").read_text().splitlines()
    rows[2] = rows[2][:-5]
    rows[4] = chat(("user", "hi"), ("assistant", None))
    (tmp_path / "train.jsonl").write_text("\n".join(rows))
    (tmp_path / "heldout.jsonl").write_bytes(lines("\n{}", good=4))
    (tmp_path / "mine.jinja").write_text(REFUSES_7 + ASK)
    quick = ["gate.enabled=false", "evaluation.metric=none", "training.max_steps=1"]
    assert run("train", recipe_file, *quick, f"data.chat_template={tmp_path / 'mine.jinja'}", "data.on_error=skip") == 0
    train, heldout = tmp_path / "train.jsonl", tmp_path / "heldout.jsonl"
    skipped = [json.loads(line) for line in (tmp_path / "run" / "skipped.jsonl").read_text().splitlines()]
    expected = [
        (train, 3, "it is not JSON: "),
        (train, 5, "`messages[1].content` is null"),
        (heldout, 6, "its columns (none) match no known format"),
        (train, 8, "it cannot be rendered: no 7"),
    ]
    assert [row["where"] for row in skipped] == [f"{path} line {line}" for path, line, _ in expected]
    assert all(row["error"].startswith(error) for row, (_, _, error) in zip(skipped, expected, strict=True))
    assert (tmp_path / "run" / "adapter" / "adapter_model.safetensors").exists()
    saved = json.loads((tmp_path / "run" / "run.json").read_text())
    assert (saved["status"], saved["data"]["skipped"], saved["data"]["train"]["sequences"]) == ("complete", 3, 9)
    assert f"3 rows skipped; the first: {train} line 3: it is not JSON" in capfd.readouterr().err


def test_skipping_ends_with_an_error_when_nothing_is_left(recipe_file: Path, tmp_path: Path, capfd) -> None:
    (tmp_path / "train.jsonl").write_text("{}")
    for command in ("validate", "train"):
        assert run(command, recipe_file, "data.on_error=skip") == 2
        [error] = errors(capfd.readouterr().err)
        assert error.startswith(f"no row of {tmp_path / 'train.jsonl'} can be used; the first: ")
    assert not (tmp_path / "run").exists()


def test_a_skipped_row_may_have_a_name_that_is_no_text(recipe_file: Path, tmp_path: Path) -> None:
    with (tmp_path / "train.jsonl").open("a") as file:
        file.write('{"\\ud800": 1}\n')
    quick = ["gate.enabled=false", "evaluation.metric=none", "training.max_steps=1", "proxy.num_samples=1"]
    assert run("train", recipe_file, *quick, "data.on_error=skip") == 0
    assert len((tmp_path / "run" / "skipped.jsonl").read_text().splitlines()) == 1


def test_data_do_not_steer_the_terminal(recipe_file: Path, tmp_path: Path, capfd) -> None:
    (tmp_path / "train.jsonl").write_text('{"\\u001b[2J\\u001b]0;title\\u0007": 1}\n')
    assert run("validate", recipe_file) == 2
    assert "\x1b" not in capfd.readouterr().err
