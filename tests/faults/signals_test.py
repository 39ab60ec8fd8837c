"""Signals: the first ends with a step and a checkpoint, the second at once; before training the first does."""

from __future__ import annotations

import signal
from pathlib import Path

import pytest

from folora_q.training.checkpoints import checkpoints, damage
from folora_q.training.fault_tolerant_trainer import FaultTolerantTrainer
from folora_q.workflows import training_run
from tests.faults.commands import assert_the_same_run, at_step, manifest, run, signalled, steps_saved


@pytest.mark.parametrize(("sent", "code"), [(signal.SIGINT, 130), (signal.SIGTERM, 143)])
def test_the_first_signal_saves_even_where_nothing_else_does(
    saving: list[object], finished: Path, tmp_path: Path, sent: signal.Signals, code: int, monkeypatch, capfd
) -> None:
    unsaved = [*saving, "training.save_steps=null"]
    before = signal.getsignal(signal.SIGINT)
    with monkeypatch.context() as patch:
        at_step(patch, 3, signalled(sent))
        assert run(*unsaved) == code
    assert signal.getsignal(signal.SIGINT) is before
    folder = tmp_path / "stopped" / "run"
    assert steps_saved(folder) == [3] and damage(folder / "checkpoint-3") is None
    assert manifest(folder)["status"] == "interrupted"
    assert not (folder / ".lock").exists()
    talk = capfd.readouterr().err
    assert "stopping after this step and a checkpoint; a second signal stops immediately" in talk
    assert "saved checkpoint-3" in talk
    assert talk.rstrip().endswith("training.save_steps=null --resume")
    assert run(*unsaved, "--resume") == 0
    assert_the_same_run(finished, folder)


def test_the_second_signal_stops_at_once_and_what_was_saved_stays_whole(
    saving: list[object], finished: Path, tmp_path: Path, monkeypatch
) -> None:
    def twice() -> None:
        signalled(signal.SIGTERM)()
        signalled(signal.SIGINT)()

    with monkeypatch.context() as patch:
        at_step(patch, 5, twice)
        assert run(*saving) == 130
    folder = tmp_path / "stopped" / "run"
    assert steps_saved(folder) == [2, 4]
    assert run(*saving, "--resume") == 0
    assert_the_same_run(finished, folder)


def test_a_second_signal_in_the_middle_of_a_save_leaves_the_one_before(
    saving: list[object], finished: Path, tmp_path: Path, monkeypatch
) -> None:
    save = FaultTolerantTrainer._save_rng_state

    def interrupted(self: FaultTolerantTrainer, folder: str) -> None:
        save(self, folder)
        if self.state.global_step == 4:
            signalled(signal.SIGINT)()
            signalled(signal.SIGINT)()

    with monkeypatch.context() as patch:
        patch.setattr(FaultTolerantTrainer, "_save_rng_state", interrupted)
        assert run(*saving) == 130
    folder = tmp_path / "stopped" / "run"
    assert steps_saved(folder) == [2]
    assert not list(folder.glob(".checkpoint-*"))
    assert run(*saving, "--resume") == 0
    assert_the_same_run(finished, folder)


@pytest.mark.parametrize(("sent", "code"), [(signal.SIGINT, 130), (signal.SIGTERM, 143)])
def test_before_training_the_first_signal_stops_at_once(
    saving: list[object], tmp_path: Path, sent: signal.Signals, code: int, monkeypatch
) -> None:
    monkeypatch.setattr(training_run, "build_trainer", lambda *a, **k: signalled(sent)())
    assert run(*saving) == code
    folder = tmp_path / "stopped" / "run"
    assert manifest(folder)["status"] == "interrupted" and not checkpoints(folder)
