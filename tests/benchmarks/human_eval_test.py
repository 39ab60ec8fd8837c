"""HumanEval's judge: right and wrong functions, and what must not harm or hang the machine."""

from __future__ import annotations

import time
from pathlib import Path

import pytest

from benchmarks.frontier import human_eval
from benchmarks.frontier.human_eval import Problem, body_of, passes, problems

ADD = Problem(
    task_id="test/0",
    prompt='def add(a: int, b: int) -> int:\n    """Return the sum."""\n',
    entry_point="add",
    test="def check(candidate):\n    assert candidate(2, 3) == 5\n    assert candidate(-1, 1) == 0\n",
)


@pytest.mark.parametrize(
    ("body", "right"),
    [
        ("    return a + b\n", True),
        ("    return a - b\n", False),
        ("    return a +\n", False),
        ("    return a + b\x00\n", False),
        ("    import sys; sys.exit(0)\n", False),
        ("    bytearray(2**31)\n    return a + b\n", False),
    ],
)
def test_a_body_passes_by_its_tests(body: str, right: bool) -> None:
    assert passes(ADD, body) is right


def test_a_body_that_does_not_end_is_stopped(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(human_eval, "SECONDS", 1)
    began = time.monotonic()
    assert not passes(ADD, "    while True:\n        pass\n")
    assert time.monotonic() - began < 30


def test_a_body_writes_into_a_folder_that_is_gone_afterwards(tmp_path: Path) -> None:
    note = tmp_path / "where"
    body = f"    import os; open({str(note)!r}, 'w').write(os.getcwd())\n    return a + b\n"
    assert passes(ADD, body)
    assert not Path(note.read_text()).exists()


@pytest.mark.parametrize(
    ("completion", "body"),
    [
        ("    return a + b\n\n\ndef other():\n    pass\n", "    return a + b\n\n"),
        ("    return a + b\nprint(add(1, 2))", "    return a + b"),
        ("    # the sum\n    return a + b\n```", "    # the sum\n    return a + b"),
        ("    return a + b", "    return a + b"),
    ],
)
def test_only_the_functions_body_is_judged(completion: str, body: str) -> None:
    assert body_of(completion) == body


def test_there_are_all_problems() -> None:
    found = problems()
    assert len(found) == 164 and len({problem.task_id for problem in found}) == 164
    assert all(problem.entry_point in problem.prompt for problem in found)
