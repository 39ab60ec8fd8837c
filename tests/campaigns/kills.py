"""Kill commands with SIGKILL a hundred times, and check that each can be repeated or resumed with the same result.

    .venv/bin/python -m tests.campaigns.kills               about five minutes on two CPU cores
    .venv/bin/python -m tests.campaigns.kills --seed 8 --kills 300

A tiny model is trained, merged and reported on. Half of the kills happen right before an operation on a file or a unit
of progress, half at a random time, drawn uniformly from the time of the stage. Afterwards

- `train --resume` must complete the run with the adapter, losses, measurements, evaluation, text and gates of an
  uninterrupted run, bit for bit, and leave no incomplete files;
- a merged folder must be absent, or complete and verified, and merging again must give the same files;
- every file of a report must be absent or complete, and reporting again must give the same files.

The exit code is 1 if any check failed. tests/faults/kills.py has the functions, and tests/faults/kill_test.py makes a
few kills.
"""

from __future__ import annotations

import os
import random
import shutil
import sys
import tempfile
import time
import traceback
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from itertools import pairwise
from pathlib import Path

os.environ["OMP_NUM_THREADS"] = "1"  # a fork cannot use its parent's threads
os.environ["HF_HUB_OFFLINE"] = "1"

from folora_q.cli.console import ConsoleProgress, quiet_libraries

quiet_libraries()  # before they are imported

import click
from rich.console import Console
from rich.markup import escape
from rich.table import Table

from tests.conftest import write_recipe
from tests.export.models import sharded_llama
from tests.faults.conftest import DEMANDING
from tests.faults.kills import (
    SAVING,
    Moment,
    assert_it_resumes,
    assert_merged_whole_or_not,
    assert_pages_whole_or_not,
    killed_after,
    killed_at,
    moments,
    recorded,
    same_files,
    traced,
)
from tests.forked import in_a_child

# Rows of the table, with their share of the kills.
SHARES = {
    "sampling": 11,
    "statistics": 16,
    "training": 17,
    "saving a checkpoint": 17,
    "evaluation": 15,
    "export (merge)": 18,
    "report": 10,
}
ROW_OF_STAGE = {
    "sampling text from the base model": "sampling",
    "statistics of both texts": "statistics",
    "training": "training",
    SAVING: "saving a checkpoint",
    "comparing losses and predictions": "evaluation",
    "answering, as base and as tuned": "evaluation",
    "measuring how far each layer moved": "evaluation",
}
BY_MOMENT, BY_TIME = "before an operation", "at a random time"
# Random times that may fall after the command's end, before the campaign gives up.
MAX_LATE_KILLS = 20


@dataclass
class Command:
    """A command to kill.

    Attributes:
        row: its row of the table, or None if that depends on the stage.
        prepare: restores the files that must exist before the command.
        check: raises AssertionError if a kill did harm.
        seen: the moments of the uninterrupted command.
    """

    arguments: Sequence[object]
    row: str | None
    prepare: Callable[[], None]
    check: Callable[[], None]
    seen: list[Moment] = field(default_factory=list)

    def row_of(self, moment: Moment) -> str | None:
        return self.row or ROW_OF_STAGE.get(moment.stage)


@dataclass
class Tally:
    """Counts of kills and of successful checks, by row and by how the time was chosen."""

    attempted: Counter[tuple[str, str]] = field(default_factory=Counter)
    survived: Counter[tuple[str, str]] = field(default_factory=Counter)
    failures: list[str] = field(default_factory=list)

    def judge(self, row: str, way: str, where: str, check: Callable[[], None]) -> None:
        self.attempted[row, way] += 1
        try:
            check()
            self.survived[row, way] += 1
        except (AssertionError, TimeoutError, OSError, ValueError, KeyError) as error:
            place = traceback.extract_tb(error.__traceback__)[-1]
            self.failures.append(f"{row}, {where}: {error or place.line} ({Path(place.filename).name}:{place.lineno})")


@click.command(help=__doc__)
@click.option("--kills", default=sum(SHARES.values()), show_default=True, type=click.IntRange(min=len(SHARES) * 2))
@click.option("--seed", default=0, show_default=True)
def main(kills: int, seed: int) -> None:
    began, chance, tally = time.monotonic(), random.Random(seed), Tally()
    table, terminal = (Console(file=os.fdopen(os.dup(number), "w"), highlight=False) for number in (1, 2))
    progress = ConsoleProgress(terminal)
    with tempfile.TemporaryDirectory() as scratch:
        os.environ["FOLORA_Q_CACHE"] = f"{scratch}/cache"
        talk = os.open(f"{scratch}/talk", os.O_WRONLY | os.O_CREAT | os.O_APPEND)
        for number in (1, 2):  # the output of the killed commands
            os.dup2(talk, number)
        with progress.stage("a run, a merge and a report without kills", None):
            commands = _commands(Path(scratch))
        planned = [row for row, share in SHARES.items() for _ in range(round(kills * share / sum(SHARES.values())))]
        with progress.stage(f"killing, with seed {seed}", len(planned)) as done:
            for number, row in enumerate(planned):
                command = chance.choice([each for each in commands if row in map(each.row_of, each.seen)])
                _kill(command, row, number % 2 == 0, Path(scratch) / "trace", chance, tally)
                done(1)
    _print(table, tally, (time.monotonic() - began) / 60)
    sys.exit(bool(tally.failures))


def _kill(command: Command, row: str, by_moment: bool, trace: Path, chance: random.Random, tally: Tally) -> None:
    """Kill a command once in a stage, and check what it left."""
    numbers = [number for number, moment in enumerate(command.seen) if command.row_of(moment) == row]
    if by_moment:
        # Choose a stage first: in a merge, the few moments of its last stage would be rare among those of its weights.
        stage = chance.choice(sorted({command.seen[number].stage for number in numbers}))
        number = chance.choice([number for number in numbers if command.seen[number].stage == stage])
        command.prepare()
        killed_at(command.arguments, trace, number)
        tally.judge(row, BY_MOMENT, f"before moment {number} of {len(command.seen)}", command.check)
        return
    # Uniform over the stage's time: a moment, weighted by the time until the next one, and a part of that time.
    gaps = [later.at - moment.at for moment, later in pairwise(command.seen)] + [0.0]
    for _ in range(MAX_LATE_KILLS):
        [number] = chance.choices(numbers, [gaps[number] for number in numbers])
        seconds = chance.uniform(0, gaps[number])
        command.prepare()
        if killed_after(command.arguments, trace, number, seconds):
            # The timing differs from the recorded run: the trace shows the stage in which the kill really happened.
            found = command.row_of(moments(trace)[-1]) or row
            tally.judge(found, BY_TIME, f"{seconds * 1000:.1f} ms after moment {number}", command.check)
            return
    raise click.ClickException(f"{row}: {MAX_LATE_KILLS} kills in a row came too late")


def _commands(scratch: Path) -> list[Command]:
    """Return the commands to kill, with the moments of one uninterrupted run of each."""
    model, trace, folder = scratch / "llama", scratch / "trace", scratch / "killed"
    in_a_child(lambda: sharded_llama(scratch))  # in a fork: this process, the parent of all forks, computes nothing
    training = [write_recipe(scratch, model), *DEMANDING, f"training.output_dir={folder}"]

    def fresh() -> None:
        shutil.rmtree(folder, ignore_errors=True)
        shutil.rmtree(scratch / "cache", ignore_errors=True)

    seen = recorded(["train", *training], trace)
    straight = folder.rename(scratch / "straight")
    train = Command(["train", *training], None, fresh, lambda: assert_it_resumes(training, folder, straight), seen)
    return [train, *_merges(straight, scratch, trace), _report(straight, scratch, trace)]


def _merges(run: Path, scratch: Path, trace: Path) -> list[Command]:
    """Return two merges: into a folder that does not exist, and replacing an earlier merge."""
    target, wholes = scratch / "merged", []
    arguments = ["merge", run, "--output", target, "--dtype"]
    for dtype in ("float32", "bfloat16"):
        seen = recorded([*arguments, dtype], trace)
        wholes.append(target.rename(scratch / dtype))

    def fresh() -> None:
        for folder in (target, *scratch.glob(".merged.*")):
            shutil.rmtree(folder, ignore_errors=True)

    def other() -> None:
        fresh()
        shutil.copytree(wholes[0], target)

    def check() -> None:
        assert_merged_whole_or_not(target, wholes)
        code = in_a_child(traced(replacing, trace))
        assert code == 0, f"merging again exits with {code}"
        assert same_files(target, wholes[1]), "merging again gives other files"

    replacing = [*arguments, "bfloat16", "--overwrite"]
    other()
    seen_replacing = recorded(replacing, trace)
    return [
        Command([*arguments, "bfloat16"], "export (merge)", fresh, check, seen),
        Command(replacing, "export (merge)", other, check, seen_replacing),
    ]


def _report(run: Path, scratch: Path, trace: Path) -> Command:
    whole, folder = scratch / "whole", scratch / "pages"
    seen = recorded(["report", run, "--output", whole / "page.html"], trace)
    arguments = ["report", run, "--output", folder / "page.html"]

    def check() -> None:
        assert_pages_whole_or_not(folder, whole)
        code = in_a_child(traced(arguments, trace))
        assert code == 0, f"reporting again exits with {code}"
        assert same_files(folder, whole), "reporting again gives other files"

    return Command(arguments, "report", lambda: shutil.rmtree(folder, ignore_errors=True), check, seen)


def _print(console: Console, tally: Tally, minutes: float) -> None:
    kills = sum(tally.attempted.values())
    table = Table(title=f"{kills} kills in {minutes:.1f} minutes: survived / attempted", title_justify="left")
    table.add_column("killed in")
    for heading in (BY_MOMENT, BY_TIME, "both"):
        table.add_column(heading, justify="right")
    for row in (*SHARES, None):
        cells = []
        for ways in ((BY_MOMENT,), (BY_TIME,), (BY_MOMENT, BY_TIME)):
            counts = [
                sum(count for (place, way), count in counter.items() if way in ways and row in (place, None))
                for counter in (tally.survived, tally.attempted)
            ]
            cells.append(f"{counts[0]} / {counts[1]}")
        table.add_row(row or "all", *cells, style=None if row else "bold")
    console.print(table)
    for failure in tally.failures:
        console.print(f"[bold red]failed:[/] {escape(failure)}", soft_wrap=True)


if __name__ == "__main__":
    main()
