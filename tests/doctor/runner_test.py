"""Whatever a check does, the next one is made."""

from __future__ import annotations

import pytest

from folora_q.doctor import Check, Examiner, Finding, State, can_train, without_user
from folora_q.doctor.runner import attempt
from tests.doctor import faulty


def test_checks_share_a_process_until_one_ends_it() -> None:
    with Examiner(seconds=20) as examiner:
        first, second = examiner.make(Check("good", faulty.good)), examiner.make(Check("good", faulty.good))
        (crashed,) = examiner.make(Check("torch", faulty.crashes))
        (exited,) = examiner.make(Check("trl", faulty.exits))
        third = examiner.make(Check("good", faulty.good))
    assert first == second
    assert third[0].state is State.GOOD and third != first
    assert (crashed.name, crashed.state) == ("torch", State.FAILURE)
    assert crashed.fact == "the check ended its process, by the signal SIGSEGV" and crashed.fix
    assert exited.fact == "the check ended its process, by exit code 3"


def test_a_check_that_hangs_is_ended() -> None:
    with Examiner(seconds=1.5) as examiner:
        (hung,) = examiner.make(Check("hub", faulty.hangs, needed=False))
        assert examiner.make(Check("warns", faulty.warns)) == faulty.warns()
    assert (hung.state, hung.fact) == (State.WARNING, "not finished within 1.5 s")


def test_an_exception_is_a_finding_with_its_cause() -> None:
    (found,) = attempt(Check("x", faulty.raises))
    assert (found.state, found.fact) == (State.FAILURE, "ValueError: the cause")
    assert "--debug" in found.fix
    (found,) = attempt(Check("x", faulty.raises, needed=False))
    assert found.state is State.WARNING
    (found,) = attempt(Check("x", faulty.lacks_a_module))
    assert found.fact == "not tested: No module named 'no_such_module'"
    assert found.fix.endswith("pip install no_such_module")


def test_no_token_password_or_name_is_told(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HF_TOKEN", "a-token-of-some-other-form")
    (found,) = attempt(Check("hub", faulty.tells_a_token))
    assert "a-token-of" not in found.fact and "<hidden>" in found.fact
    monkeypatch.setenv("HOME", "/home/alice")
    monkeypatch.setattr("getpass.getuser", lambda: "alice")
    text = "hf_abcdefghij and http://alice:secret@proxy in /home/alice/x, /home/alice2 and (/data/alice)"
    (found,) = attempt(Check("x", lambda: [Finding("x", State.NOTE, text, "/home/alice/bin/python -m pip")]))
    assert found.fact == "<hidden> and http://<hidden>@proxy in ~/x, /home/alice2 and (/data/alice)"
    assert found.fix == "~/bin/python -m pip"
    assert without_user(found).fact.endswith("(/data/USER)")


def test_only_a_failure_means_that_training_cannot_work() -> None:
    lines = [Finding("x", state, "fact", "fix") for state in (State.GOOD, State.NOTE, State.WARNING)]
    assert can_train(lines)
    assert not can_train([*lines, Finding("x", State.FAILURE, "fact", "fix")])
