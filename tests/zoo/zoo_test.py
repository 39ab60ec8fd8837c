"""Every architecture goes through every command; docs/models.md says what comes of it."""

from __future__ import annotations

import gc
from pathlib import Path

import pytest

from docs.make_models_page import TARGET, row
from tests.zoo.members import MEMBERS
from tests.zoo.walk import walk

# These are trained by every rule of the gate, and resumed: one of each way to hold weights and adapters.
COMPLETE = {"llama", "qwen3-moe", "gemma3", "fp4-skipped", "gpt2"}


@pytest.fixture(scope="module", autouse=True)
def frozen_libraries() -> None:
    gc.freeze()  # a run collects garbage, and would look through all of torch and transformers for it


@pytest.mark.parametrize("name", MEMBERS)
def test_every_command_works_or_validate_says_why_not(name: str, tmp_path: Path) -> None:
    found = walk(name, tmp_path, complete=name in COMPLETE)
    assert row(found) in TARGET.read_text("utf-8"), "run docs/make_models_page.py"


def test_the_page_has_every_member_and_no_other() -> None:
    lines = TARGET.read_text("utf-8").splitlines()
    titles = [line.split("|")[1].strip() for line in lines if line.startswith("| ") and "---" not in line][1:]
    assert titles == [member.title for member in MEMBERS.values()]
