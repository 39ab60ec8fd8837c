"""SIGKILL at chosen moments of a command, and what must hold afterwards. Shared with benchmarks/kills.py.

A moment is an operation on a file or a unit of progress: a batch of the statistics, a step, a weight that was merged.
Each is written to a trace before it happens, so that a run that nothing stops says which moments there are, in which
stage and when, and a killed one how far it came. The command runs in a fork of this process, which pays for no import.
"""

from __future__ import annotations

import builtins
import gc
import io
import os
import shutil
import signal
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from folora_q.cli.app import main
from folora_q.cli.console import ConsoleProgress
from folora_q.training.checkpoints import checkpoints, damage
from folora_q.training.fault_tolerant_trainer import FaultTolerantTrainer
from tests.faults.commands import assert_the_same_run, manifest

# What is done to files, and where its function is looked up; of `open`, what opens to write.
OPERATIONS = [
    (os, "replace"),
    (os, "fsync"),
    (os, "ftruncate"),
    (os, "unlink"),
    (shutil, "rmtree"),
    (shutil, "copyfile"),
    (torch, "save"),
    (builtins, "open"),
    (io, "open"),
]
STARTING, SAVING = "starting", "saving a checkpoint"


@dataclass(frozen=True)
class Moment:
    """The stage that it falls into, and when it was, in seconds of the system's monotonic clock."""

    stage: str
    at: float


def in_a_child(act: Callable[[], None], timeout: float = 100.0, kill: Callable[[], bool] = lambda: False) -> int:
    """The exit code of an act in a fork of this process, negative where a signal ended it.

    Args:
        kill: asked every millisecond whether to kill it now.
    """
    child = os.fork()
    if child == 0:
        gc.freeze()  # what was imported needs no collecting, which would take half of a second each time
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
        late = time.monotonic() > deadline
        if late or kill():
            os.kill(child, signal.SIGKILL)
            _, status = os.waitpid(child, 0)
            if late:
                raise TimeoutError("the child hangs")
            return os.waitstatus_to_exitcode(status)
        time.sleep(0.001)


def traced(arguments: Sequence[object], trace: Path, kill_at: int | None = None) -> Callable[[], None]:
    """`folora-q` with these arguments, which writes its moments to a trace; for `in_a_child`, since it patches freely.

    Args:
        kill_at: the moment right before which it dies, counted from 0.
    """

    def act() -> None:
        handle = os.open(trace, os.O_WRONLY | os.O_CREAT | os.O_TRUNC | os.O_APPEND)
        stages, count = [STARTING], 0

        def moment() -> None:
            nonlocal count
            os.write(handle, f"{time.monotonic()} {stages[-1]}\n".encode())
            if count == kill_at:
                os.kill(os.getpid(), signal.SIGKILL)
            count += 1

        def before(operation: Callable[..., Any]) -> Callable[..., Any]:
            def counted(*args: Any, **kwargs: Any) -> Any:
                mode = kwargs.get("mode", args[1] if len(args) > 1 else "r")
                if operation.__name__ != "open" or set(mode) & set("wax+"):
                    moment()
                return operation(*args, **kwargs)

            return counted

        for module, name in OPERATIONS:
            setattr(module, name, before(getattr(module, name)))
        _watch_stages(stages, moment)
        main([str(argument) for argument in arguments])

    return act


def _watch_stages(stages: list[str], moment: Callable[[], None]) -> None:
    """Let the last of `stages` be what the command is at; a stage lasts until the next one begins."""
    stage, save = ConsoleProgress.stage, FaultTolerantTrainer._save_checkpoint

    @contextmanager
    def watched(self: ConsoleProgress, title: str, total: int | None) -> Iterator[Callable[[int], None]]:
        stages[-1] = title
        moment()
        with stage(self, title, total) as advance:

            def advanced(units: int) -> None:
                moment()
                advance(units)

            yield advanced

    def saved(self: FaultTolerantTrainer, *args: Any) -> None:
        stages.append(SAVING)
        save(self, *args)
        stages.pop()

    ConsoleProgress.stage, FaultTolerantTrainer._save_checkpoint = watched, saved


def moments(trace: Path) -> list[Moment]:
    """What a command has done so far."""
    lines = trace.read_text().splitlines() if trace.exists() else []
    return [Moment(stage, float(at)) for at, stage in (line.split(" ", 1) for line in lines)]


def recorded(arguments: Sequence[object], trace: Path) -> list[Moment]:
    """The moments of a command that nothing stops."""
    code = in_a_child(traced(arguments, trace))
    assert code == 0, f"without a kill it exits with {code}"
    return moments(trace)


def killed_at(arguments: Sequence[object], trace: Path, number: int) -> None:
    """Kill a command right before one of its moments."""
    code = in_a_child(traced(arguments, trace, number))
    assert code == -signal.SIGKILL, f"it came to no moment {number}, and exited with {code}"


def killed_after(arguments: Sequence[object], trace: Path, number: int, seconds: float) -> bool:
    """Kill a command some time after one of its moments; False if it ended before that."""
    trace.unlink(missing_ok=True)

    def due() -> bool:
        seen = moments(trace)
        return len(seen) > number and time.monotonic() >= seen[number].at + seconds

    code = in_a_child(traced(arguments, trace), kill=due)
    assert code in (0, -signal.SIGKILL), f"it exited with {code}"
    return code != 0


def assert_it_goes_on(arguments: Sequence[object], folder: Path, straight: Path) -> None:
    """Of what a killed `folora-q train` left, `--resume` makes the run that nothing stopped, and nothing else.

    Args:
        arguments: of the run, from the recipe on.
        straight: the run that nothing stopped.
    """
    for checkpoint in checkpoints(folder):
        assert damage(checkpoint) is None, f"{checkpoint.name}: {damage(checkpoint)}"
    if not (folder / "run.json").exists() or manifest(folder)["status"] != "complete":
        code = in_a_child(lambda: main(["train", *map(str, arguments), "--resume"]))
        assert code == 0, f"--resume exits with {code}"
        assert not list(folder.glob(".*")), f"left behind: {[path.name for path in folder.glob('.*')]}"
    assert_the_same_run(straight, folder)


def assert_merged_whole_or_not(target: Path, wholes: Sequence[Path]) -> None:
    """A merged folder is not there, or one of these; also of what is hidden beside it, none looks like a model.

    Args:
        wholes: merged folders that nothing stopped.
    """
    if target.exists():
        assert any(same_files(target, whole) for whole in wholes), f"{target.name} is another than any whole one"
    shards = {path.name for path in wholes[0].glob("*.safetensors")}
    for folder in target.parent.glob(f".{target.name}.*"):
        there = {path.name for path in folder.iterdir()}
        assert "config.json" not in there or shards <= there, f"{folder.name} has config.json and not all of its shards"


def assert_pages_whole_or_not(folder: Path, whole: Path) -> None:
    """Every file that has its name is as it would be without a kill."""
    for path in folder.rglob("*"):
        if path.is_file() and not path.name.startswith("."):
            assert path.read_bytes() == (whole / path.relative_to(folder)).read_bytes(), f"{path.name} is half of one"


def same_files(one: Path, other: Path) -> bool:
    """Whether two folders hold the same files, byte for byte; what is hidden is not looked at."""
    found = [
        {path.relative_to(folder): path.read_bytes() for path in folder.rglob("[!.]*") if path.is_file()}
        for folder in (one, other)
    ]
    return found[0] == found[1]
