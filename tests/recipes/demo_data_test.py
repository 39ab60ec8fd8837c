"""The demo's task is what its script says, and its held-out rows are really held out."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest

DEMO = Path(__file__).parents[2] / "recipes" / "demo"


def rows(name: str) -> list[dict]:
    return [json.loads(line) for line in (DEMO / name).read_text("utf-8").splitlines()]


def turns(name: str) -> list[tuple[str, dict]]:
    return [(row["messages"][-2]["content"], json.loads(row["messages"][-1]["content"])) for row in rows(name)]


def test_the_script_writes_the_committed_files_byte_for_byte(tmp_path: Path) -> None:
    subprocess.run([sys.executable, DEMO / "make_data.py", "--output", tmp_path], check=True)
    for name in ("train.jsonl", "heldout.jsonl"):
        assert (tmp_path / name).read_bytes() == (DEMO / name).read_bytes()
        assert (DEMO / name).stat().st_size < 1_000_000


@pytest.mark.parametrize("name", ["train.jsonl", "heldout.jsonl"])
def test_every_answer_is_a_strict_record_that_its_sentence_supports(name: str) -> None:
    numbers = ["two", "three", "four", "five", "six", "seven", "eight", "nine", "ten"]
    for asked, record in turns(name):
        assert list(record) == ["name", "guests", "day", "time", "seating"]
        assert record["name"] in asked
        assert record["day"] in asked
        assert any(word in asked.lower() for word in (numbers[record["guests"] - 2], str(record["guests"])))
        assert record["seating"] in ("any", "inside", "outside")
        hours, minutes = map(int, record["time"].split(":"))
        assert 0 <= hours < 24 and 0 <= minutes < 60


def test_no_name_and_no_sentence_of_training_is_held_out() -> None:
    train, heldout = turns("train.jsonl"), turns("heldout.jsonl")
    words = {word for _, record in train for word in record["name"].split()}
    assert not words & {word for _, record in heldout for word in record["name"].split()}
    assert not {asked for asked, _ in train} & {asked for asked, _ in heldout}
    assert len({asked for asked, _ in heldout}) == len(heldout)
