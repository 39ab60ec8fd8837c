from __future__ import annotations

import re
from pathlib import Path

import pytest

from folora_q.data.templates import OURS, read_template, template_names
from folora_q.errors import UserError


def test_ours_and_trls_have_names_and_those_for_training_have_none() -> None:
    names = template_names()
    assert {"chatml", "alpaca", "vicuna", "mistral"} <= names.keys()
    assert {"llama3", "qwen2_5", "gemma", "phi3"} <= names.keys()
    assert not [name for name in names if name.endswith("_training")]


def test_ours_have_no_marks_so_that_other_programs_read_them() -> None:
    for path in OURS.glob("*.jinja"):
        assert not re.search(r"\{%-?\s*generation", path.read_text("utf-8")), path


def test_a_file_is_read_as_it_is(tmp_path: Path) -> None:
    path = tmp_path / "mine.jinja"
    path.write_text("{{ messages }} ü\n", encoding="utf-8")
    assert read_template(str(path)) == "{{ messages }} ü\n"


def test_a_wrong_name_and_a_broken_file_are_the_users(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="no template named 'chatmll'; did you mean chatml?"):
        read_template("chatmll")
    (tmp_path / "latin.jinja").write_bytes(b"\xff")
    with pytest.raises(UserError, match="cannot read .*latin.jinja"):
        read_template(str(tmp_path / "latin.jinja"))
