"""Measure the start-up time of commands that need no model, compared with an empty Python process.

    .venv/bin/python -m benchmarks.performance.validate            about a minute
    .venv/bin/python -m benchmarks.performance.validate --runs 20

The large file has 100,000 rows of chats; `validate` reads the first 1,000, `validate --all-rows` all of them.
"""

from __future__ import annotations

import json
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import click
from rich.table import Table

from folora_q.cli.console import out
from folora_q.recipe.shipped import recipes_folder

PROGRAM = [sys.executable, "-m", "folora_q"]
ROWS = 100_000


def seconds(command: list[str], runs: int) -> list[float]:
    """Return the wall times of a command, run once more before that as a warm-up."""
    times = []
    for _ in range(runs + 1):
        began = time.perf_counter()
        subprocess.run(command, check=True, capture_output=True)
        times.append(time.perf_counter() - began)
    return times[1:]


def large_file(folder: Path) -> Path:
    """Write a file of chats with about 400 characters each."""
    path = folder / "large.jsonl"
    with path.open("w", encoding="utf-8") as file:
        for number in range(ROWS):
            turns = [{"role": "user", "content": f"{number} " + "question " * 15}]
            turns.append({"role": "assistant", "content": "answer " * 25})
            file.write(json.dumps({"messages": turns}) + "\n")
    return path


@click.command()
@click.option("--runs", default=7, show_default=True, type=click.IntRange(min=1))
def main(runs: int) -> None:
    """Print a table of wall times and their ratio to an empty Python process."""
    demo = str(recipes_folder() / "demo.yaml")
    with tempfile.TemporaryDirectory() as scratch:
        data = large_file(Path(scratch))
        megabytes = data.stat().st_size / 1e6
        large = [demo, f"data.train_dataset={data}"]
        commands = {
            "python -c pass": [sys.executable, "-c", "pass"],
            "folora-q --help": [*PROGRAM, "--help"],
            "folora-q schema": [*PROGRAM, "schema"],
            "folora-q validate demo": [*PROGRAM, "validate", demo],
            "folora-q validate 8b-16gb-math (hub data)": [
                *PROGRAM,
                "validate",
                str(recipes_folder() / "8b-16gb-math.yaml"),
            ],
            f"folora-q validate, {megabytes:.0f} MB of rows": [*PROGRAM, "validate", *large],
            f"folora-q validate --all-rows, {megabytes:.0f} MB": [*PROGRAM, "validate", *large, "--all-rows"],
        }
        table = Table(title=f"{runs} runs each, seconds", title_justify="left")
        for heading in ("command", "min", "median", "max", "times an empty Python"):
            table.add_column(heading, justify="left" if heading == "command" else "right")
        empty = None
        for name, command in commands.items():
            times = seconds(command, runs)
            median = statistics.median(times)
            empty = empty or median
            table.add_row(name, f"{min(times):.2f}", f"{median:.2f}", f"{max(times):.2f}", f"{median / empty:.0f} x")
    out.print(table)


if __name__ == "__main__":
    main()
