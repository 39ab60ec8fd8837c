"""What a few steps of each method cost, in two processes of its own, one for the time and one for the memory.

Runs are made on several days and beside each other, so their times do not compare, and statistics that stay in a
process blur its memory. What a method computes before its first step is let go of first, as the product does; only what
it keeps for its steps counts. On a CPU the peak is the kernel's high-water mark, libraries and all.
"""

from __future__ import annotations

import dataclasses
import gc
import json
import os
import subprocess
import sys
from collections.abc import Callable, Sequence
from dataclasses import asdict
from pathlib import Path

from benchmarks.frontier.ground import Ground
from benchmarks.frontier.series import methods
from benchmarks.frontier.training import Cost, train
from benchmarks.live_tensors import GIVE_BACK
from folora_q.cli.console import ConsoleProgress
from folora_q.errors import RunFailed
from folora_q.files import atomic_write
from folora_q.progress import Clock
from folora_q.recipe import load_recipe

# B's gates are solved for in every tenth step.
STEPS = 10
# The size of a covariance does not depend on how much text it is of.
LITTLE_TEXT = ("proxy.num_samples=8", "gate.num_task_samples=8")


def measure_all(
    names: Sequence[str], recipe: Path, overrides: Sequence[str], output: Path, tell: Callable[[str], None]
) -> None:
    """Measure series, by name, and keep what was found beside the runs; what is there is not measured again.

    Raises:
        RunFailed: a process failed.
    """
    found = read_costs(output, recipe.stem)
    for name in names:
        if name in found:
            continue
        command = [sys.executable, "-m", "benchmarks.frontier", "costs", "--task", recipe.stem, "--one", name]
        timed, weighed = (
            _child([*command, "--output", str(output), *overrides], settings) for settings in ({}, GIVE_BACK)
        )
        found[name] = dataclasses.replace(timed, peak_bytes=weighed.peak_bytes)
        _path(output, recipe.stem).parent.mkdir(parents=True, exist_ok=True)
        text = json.dumps({name: asdict(cost) for name, cost in found.items()}, indent=1, ensure_ascii=False)
        atomic_write(_path(output, recipe.stem), text + "\n")
        tell(f"{recipe.stem}: {name}: {found[name].seconds:.1f} s, {(found[name].peak_bytes or 0) / 2**20:,.0f} MiB")


def _child(command: list[str], settings: dict[str, str]) -> Cost:
    """What `measure` finds in a process with these settings; those that give memory back make it slower."""
    child = subprocess.run(command, stdout=subprocess.PIPE, text=True, env=os.environ | settings, check=False)
    if child.returncode:
        raise RunFailed(f"it could not be measured: {' '.join(command)}")
    return Cost(**json.loads(child.stdout))


def read_costs(output: Path, task: str) -> dict[str, Cost]:
    """Of the series that have been measured."""
    path = _path(output, task)
    found = json.loads(path.read_text("utf-8")) if path.exists() else {}
    return {name: Cost(**cost) for name, cost in found.items()}


def _path(output: Path, task: str) -> Path:
    return output / "costs" / f"{task}.json"


def measure(name: str, recipe: Path, overrides: Sequence[str], output: Path) -> Cost:
    """Of a few training steps, in this process."""
    (series,) = [series for series in methods() if series.name == name]
    ground = Ground(load_recipe(recipe, [*LITTLE_TEXT, *overrides]), output, Clock(ConsoleProgress()))

    def let_go() -> None:
        ground.forget()
        gc.collect()

    _, cost = train(ground, dataclasses.replace(series.points[0]), seed=0, steps=STEPS, prepared=let_go)
    return cost
