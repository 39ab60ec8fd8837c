"""Kill commands with SIGKILL at chosen moments, and check what they left. Shared with tests/campaigns/kills.py.

A moment is an operation on a file or a unit of progress: a batch of the statistics, a step, a merged weight. Each is
written to a trace before it happens. The trace of an uninterrupted run lists all moments, their stages and times; the
trace of a killed run shows how far it came.
"""

from __future__ import annotations

import builtins
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
from tests.forked import in_a_child

# Operations on files, each as the module and the name of its function; `open` counts if it opens for writing.
OPERATIONS: list[tuple[Any, str]] = [
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
    """The stage that a moment belongs to, and its time in seconds of the system's monotonic clock."""

    stage: str
    at: float


def traced(arguments: Sequence[object], trace: Path, kill_at: int | None = None) -> Callable[[], None]:
    """Return a function that runs `folora-q` and writes its moments to a trace.

    It patches modules without undoing that, so call it with `in_a_child`.

    Args:
        kill_at: the number, from 0, of the moment right before which it kills itself.
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
    """Keep the command's current stage as the last of `stages`; a stage lasts until the next one begins."""
    stage, save = ConsoleProgress.stage, FaultTolerantTrainer._save_checkpoint

    @contextmanager
    def watched(self: ConsoleProgress, title: str, total: int | None, *unit: Any) -> Iterator[Callable[[int], None]]:
        stages[-1] = title
        moment()
        with stage(self, title, total, *unit) as advance:

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
    """Return the moments of a command so far."""
    lines = trace.read_text().splitlines() if trace.exists() else []
    return [Moment(stage, float(at)) for at, stage in (line.split(" ", 1) for line in lines)]


def recorded(arguments: Sequence[object], trace: Path) -> list[Moment]:
    """Run a command to its end, and return its moments."""
    code = in_a_child(traced(arguments, trace))
    assert code == 0, f"without a kill the command exits with {code}"
    return moments(trace)


def killed_at(arguments: Sequence[object], trace: Path, number: int) -> None:
    """Kill a command right before one of its moments."""
    code = in_a_child(traced(arguments, trace, number))
    assert code == -signal.SIGKILL, f"the command did not reach moment {number}; it exited with {code}"


def killed_after(arguments: Sequence[object], trace: Path, number: int, seconds: float) -> bool:
    """Kill a command some time after one of its moments; return False if it ended before that."""
    trace.unlink(missing_ok=True)

    def due() -> bool:
        seen = moments(trace)
        return len(seen) > number and time.monotonic() >= seen[number].at + seconds

    code = in_a_child(traced(arguments, trace), kill=due)
    assert code in (0, -signal.SIGKILL), f"the command exited with {code}"
    return code != 0


def assert_it_resumes(arguments: Sequence[object], folder: Path, straight: Path) -> None:
    """Resume a killed `folora-q train`, and check that the result equals the uninterrupted run, with no other files.

    Args:
        arguments: those of the run, from the recipe on.
        straight: the folder of the uninterrupted run.
    """
    for checkpoint in checkpoints(folder):
        assert damage(checkpoint) is None, f"{checkpoint.name}: {damage(checkpoint)}"
    if not (folder / "run.json").exists() or manifest(folder)["status"] != "complete":
        begun = (folder / "run.json").exists() or (folder / ".lock").exists()
        code = in_a_child(lambda: main(["train", *map(str, arguments), *["--resume"] * begun]))
        assert code == 0, f"train, with --resume: {begun}, exits with {code}"
        assert not list(folder.glob(".*")), f"left behind: {[path.name for path in folder.glob('.*')]}"
    assert_the_same_run(straight, folder)


def assert_merged_whole_or_not(target: Path, wholes: Sequence[Path]) -> None:
    """Check that a merged folder is absent or complete, and that no hidden folder next to it looks like a model.

    Args:
        wholes: folders of uninterrupted merges, one of which it must equal.
    """
    if target.exists():
        assert any(same_files(target, whole) for whole in wholes), f"{target.name} equals no complete merge"
    shards = {path.name for path in wholes[0].glob("*.safetensors")}
    for folder in target.parent.glob(f".{target.name}.*"):
        there = {path.name for path in folder.iterdir()}
        assert "config.json" not in there or shards <= there, f"{folder.name} has config.json but not all shards"


def assert_pages_whole_or_not(folder: Path, whole: Path) -> None:
    """Check that every file under its final name is as an uninterrupted command writes it."""
    for path in folder.rglob("*"):
        if path.is_file() and not path.name.startswith("."):
            assert path.read_bytes() == (whole / path.relative_to(folder)).read_bytes(), f"{path.name} is incomplete"


def same_files(one: Path, other: Path) -> bool:
    """Return whether two folders have the same files, byte for byte; hidden files do not count."""
    found = [
        {path.relative_to(folder): path.read_bytes() for path in folder.rglob("[!.]*") if path.is_file()}
        for folder in (one, other)
    ]
    return found[0] == found[1]
