"""SIGKILL, at moments chosen by what is done to files: whatever it leaves, `--resume` makes the same run of it."""

from __future__ import annotations

import os
import random
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

import pytest
import torch

from folora_q.cli.app import main
from folora_q.training.checkpoints import checkpoints, damage
from tests.faults.commands import assert_the_same_run, at_step, manifest, run, steps_saved

# What is done to files, and where its function is looked up.
OPERATIONS = [(os, "replace"), (os, "fsync"), (torch, "save"), (shutil, "rmtree"), (os, "ftruncate")]
SEED, TRIALS = 7, 5


def in_a_child(act: Callable[[], None], timeout: float = 100.0) -> int:
    """The exit code of an act in a fork of this process, negative where a signal ended it. Imports are not repeated."""
    child = os.fork()
    if child == 0:
        try:
            act()
            os._exit(0)
        except SystemExit as end:
            os._exit(end.code or 0)
        except BaseException:
            os._exit(99)
    deadline = time.monotonic() + timeout
    while True:
        ended, status = os.waitpid(child, os.WNOHANG)
        if ended:
            return os.waitstatus_to_exitcode(status)
        if time.monotonic() > deadline:
            os.kill(child, signal.SIGKILL)
            os.waitpid(child, 0)
            raise TimeoutError("the child hangs")
        time.sleep(0.01)


def counted(arguments: list[object], count_file: Path, kill_at: int | None = None) -> Callable[[], None]:
    """A run that counts its operations on files, and dies right before one of them."""

    def act() -> None:
        done = 0

        def wrap(operation: Callable) -> Callable:
            def wrapped(*args, **kwargs):
                nonlocal done
                done += 1
                if done == kill_at:
                    os.kill(os.getpid(), signal.SIGKILL)
                return operation(*args, **kwargs)

            return wrapped

        for module, name in OPERATIONS:
            setattr(module, name, wrap(getattr(module, name)))
        try:
            main(["train", *map(str, arguments)])
        finally:
            count_file.write_text(str(done))

    return act


def test_killed_at_any_operation_on_a_file_a_run_goes_on_to_the_same_end(
    saving: list[object], finished: Path, tmp_path: Path
) -> None:
    folder, count = tmp_path / "stopped" / "run", tmp_path / "count"
    assert in_a_child(counted(saving, count)) == 0
    assert_the_same_run(finished, folder)
    operations = int(count.read_text())
    assert operations > 50
    # One out of each part of the run, so that the beginning, the saves and the end all have their turn.
    chance, width = random.Random(SEED), operations / TRIALS
    for trial in range(TRIALS):
        shutil.rmtree(folder, ignore_errors=True)
        shutil.rmtree(tmp_path / "cache")
        kill_at = 1 + int(trial * width + chance.random() * width)
        assert in_a_child(counted(saving, count, kill_at)) == -signal.SIGKILL, kill_at
        assert all(damage(path) is None for path in checkpoints(folder)), kill_at
        if (folder / "run.json").exists() and manifest(folder)["status"] == "complete":
            continue  # there was nothing left to do but to unlock the folder
        assert in_a_child(lambda: main(["train", *map(str, saving), "--resume"])) == 0, kill_at
        assert_the_same_run(finished, folder)
        assert not list(folder.glob(".*")), kill_at


def test_a_killed_run_is_continued_by_a_fresh_process(saving: list[object], finished: Path, tmp_path: Path) -> None:
    command = [sys.executable, "-m", "folora_q", "train", *map(str, saving)]
    folder = tmp_path / "stopped" / "run"
    child = os.fork()
    if child == 0:
        counted(saving, tmp_path / "count")()
        os._exit(0)
    try:
        deadline = time.monotonic() + 60
        while not (folder / "checkpoint-2").exists():
            assert time.monotonic() < deadline
            time.sleep(0.001)
    finally:
        os.kill(child, signal.SIGKILL)
        os.waitpid(child, 0)
    assert manifest(folder)["status"] == "running" and 2 in steps_saved(folder)
    done = subprocess.run([*command, "--resume"], capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stderr
    assert f"took {folder} over from process {child}: it is gone" in done.stderr
    assert f"going on from checkpoint-{manifest(folder)['resumed'][0]['step']}" in done.stderr
    assert_the_same_run(finished, folder)


@pytest.mark.skipif(os.name != "posix" or os.geteuid() != 0, reason="takes root, to mount a small disk")
def test_a_disk_that_fills_up_while_saving_leaves_the_checkpoint_before(
    saving: list[object], finished: Path, tmp_path: Path, capfd
) -> None:
    disk = tmp_path / "stopped"
    disk.mkdir()
    if subprocess.run(["mount", "-t", "tmpfs", "-o", "size=4m", "none", disk], capture_output=True).returncode:
        pytest.skip("no disk can be mounted here")
    folder, ballast = disk / "run", disk / "ballast"
    try:
        with pytest.MonkeyPatch.context() as patch:
            at_step(patch, 3, lambda: ballast.write_bytes(bytes(max(0, shutil.disk_usage(disk).free - 60_000))))
            assert run(*saving) == 1
        assert "cannot save " in (talk := capfd.readouterr().err) and "checkpoint-4" in talk
        assert steps_saved(folder) == [2] and damage(folder / "checkpoint-2") is None
        assert not list(folder.glob(".checkpoint-*"))
        ballast.unlink()
        assert run(*saving, "--resume") == 0
        assert_the_same_run(finished, folder)
    finally:
        subprocess.run(["umount", disk], check=False)
