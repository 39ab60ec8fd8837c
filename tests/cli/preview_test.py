"""`folora-q preview`: what is learned is seen, with and without colours, and so is what was left out."""

from __future__ import annotations

import gzip
import re
from pathlib import Path

import pytest
from rich.console import Console

from folora_q.cli import preview
from folora_q.cli.app import main
from tests.data.rows import assistant, user, write_jsonl


def run(*arguments: object) -> int:
    with pytest.raises(SystemExit) as caught:
        main(["preview", *map(str, arguments)])
    return caught.value.code


def test_learned_text_stands_in_brackets_without_colours(recipe_file: Path, tmp_path: Path, capfd) -> None:
    assert run(recipe_file, "-n", 12) == 0
    text = capfd.readouterr().out
    for number in range(12):
        assert f"{tmp_path / 'train.jsonl'} line {number + 1} " in text
        asked = f"<|im_start|>user\nsay {number}<|im_end|>\n<|im_start|>assistant\n"
        assert f"{asked}⟦it is {number}<|im_end|>\n⟧" in text
    assert "\x1b" not in text
    assert not (tmp_path / "run").exists()


def test_learned_text_is_green_in_a_terminal(recipe_file: Path, capfd, monkeypatch) -> None:
    monkeypatch.setattr(preview, "out", Console(force_terminal=True, color_system="standard", highlight=False))
    assert run(recipe_file, "-n", 1) == 0
    text = capfd.readouterr().out
    [green] = re.findall(r"\x1b\[32m(it is \d+<\|im_end\|>)", text)
    assert "⟦" not in text
    assert re.search(r"\x1b\[2m<\|im_start\|>user", text)


def test_counts_add_up(recipe_file: Path, capfd) -> None:
    assert run(recipe_file, "-n", 0) == 0
    text = capfd.readouterr().out
    tokens, learned = (int(n.replace(",", "")) for n in re.search(r"([\d,]+) tokens, ([\d,]+) of them", text).groups())
    assert "12 sequences by length in tokens" in text
    bars = re.findall(r"^ +[\d,]+(?: to [\d,]+)? +(█*) +(\d+) *$", text, re.MULTILINE)
    assert sum(int(count) for _, count in bars) == 12
    # <|im_end|> and a line's end after each of "it is 0" to "it is 11", which are bytes but for the "it"
    assert learned == sum(len(f"it is {i}") for i in range(12)) + 24
    assert tokens > learned


def test_held_out_rows_can_be_seen(recipe_file: Path, tmp_path: Path, capfd) -> None:
    assert run(recipe_file, "--heldout", "-n", 9) == 0
    text = capfd.readouterr().out
    assert text.count(f"{tmp_path / 'heldout.jsonl'} line") == 4


def test_what_was_left_out_is_told_with_the_reason(recipe_file: Path, tmp_path: Path, capfd) -> None:
    rows = [{"messages": [user("a"), assistant("b")]} for _ in range(9)]
    rows[3] = {"messages": [user("a"), assistant("b" * 200)]}
    rows[5] = {"messages": [user("a"), {"role": "assistant", "content": None}]}
    path = write_jsonl(tmp_path / "train.jsonl", rows)
    assert run(recipe_file, "data.on_error=skip", "training.max_length=100", "-n", 1) == 0
    text = capfd.readouterr().out
    assert "1 examples over 100 tokens were left out (data.overlong)" in text
    assert "1 rows were skipped (data.on_error)" in text
    assert f"{path} line 6: `messages[1].content` is null" in text


def test_data_cannot_steer_the_terminal(recipe_file: Path, tmp_path: Path, capfd) -> None:
    write_jsonl(tmp_path / "train.jsonl", [{"messages": [user("\x1b[2J[red]x[/]"), assistant("\x07bell")]}])
    assert run(recipe_file, "-n", 1) == 0
    text = capfd.readouterr().out
    assert "\x1b" not in text and "\x07" not in text
    assert "\\x1b[2J[red]x[/]" in text


def test_long_examples_are_cut_in_the_middle_unless_whole_ones_are_asked_for(
    recipe_file: Path, tmp_path: Path, capfd
) -> None:
    write_jsonl(tmp_path / "train.jsonl", [{"messages": [user("a"), assistant("b" * 5000)]}])
    changes = ["training.max_length=6000", "-n", 1]
    assert run(recipe_file, *changes) == 0
    assert "characters ...]" in capfd.readouterr().out
    assert run(recipe_file, *changes, "--full") == 0
    assert "b" * 5000 in capfd.readouterr().out


@pytest.mark.parametrize("command", ["validate", "preview", "train"])
def test_what_a_folder_holds_and_is_not_read_is_named(recipe_file: Path, tmp_path: Path, capfd, command: str) -> None:
    folder = tmp_path / "data"
    write_jsonl((folder.mkdir() or folder) / "a.jsonl", [{"messages": [user("a"), assistant("b")]}] * 4)
    (folder / "b.jsonl.gz").write_bytes(gzip.compress((folder / "a.jsonl").read_bytes()))
    (folder / "c.zip").write_bytes(b"PK\x03\x04")
    (folder / "README.md").write_text("about the data")
    quick = ["gate.enabled=false", "evaluation.metric=none", "training.max_steps=1", f"data.train_dataset={folder}"]
    with pytest.raises(SystemExit) as caught:
        main([command, str(recipe_file), *quick])
    assert caught.value.code == 0
    told = "".join(capfd.readouterr())
    assert f"{folder}: 8 rows of `messages`" in told
    assert "not read: c.zip (it is an archive: unpack it); README.md (a text file among tables)" in told
