"""Peak memory of each method's training, in a process of its own: statistics that stay in a process would blur it.

What a method computes before its first step is let go of first, as the product does; only what it keeps for its steps
counts. On a CPU it is the kernel's high-water mark, libraries and all.
"""

from __future__ import annotations

import dataclasses
import gc
import json
import os
import subprocess
import sys
from collections.abc import Callable, Sequence
from pathlib import Path

from benchmarks.frontier.ground import Ground
from benchmarks.frontier.series import methods
from benchmarks.frontier.training import train
from benchmarks.live_tensors import GIVE_BACK
from folora_q.cli.console import ConsoleProgress
from folora_q.errors import RunFailed
from folora_q.files import atomic_write
from folora_q.progress import Clock
from folora_q.recipe import load_recipe

STEPS = 3
# The size of a covariance does not depend on how much text it is of.
LITTLE_TEXT = ("proxy.num_samples=8", "gate.num_task_samples=8")


def measure_all(
    names: Sequence[str], recipe: Path, overrides: Sequence[str], output: Path, tell: Callable[[str], None]
) -> None:
    """Measure series, by name, and keep what was found beside the runs.

    Raises:
        RunFailed: a process failed.
    """
    found = read_memory(output, recipe.stem)
    for name in names:
        if name in found:
            continue
        command = [sys.executable, "-m", "benchmarks.frontier", "memory", "--task", recipe.stem, "--one", name]
        child = subprocess.run(
            [*command, "--output", str(output), *overrides],
            stdout=subprocess.PIPE,
            text=True,
            env=os.environ | GIVE_BACK,
            check=False,
        )
        if child.returncode:
            raise RunFailed(f"the memory of {name} could not be measured")
        found[name] = int(child.stdout)
        _path(output, recipe.stem).parent.mkdir(parents=True, exist_ok=True)
        atomic_write(_path(output, recipe.stem), json.dumps(found, indent=1, ensure_ascii=False) + "\n")
        tell(f"{recipe.stem}: {name}: {found[name] / 2**20:,.0f} MiB")


def read_memory(output: Path, task: str) -> dict[str, int]:
    """Bytes at the peak by series, of those that have been measured."""
    path = _path(output, task)
    return json.loads(path.read_text("utf-8")) if path.exists() else {}


def _path(output: Path, task: str) -> Path:
    return output / "memory" / f"{task}.json"


def measure(name: str, recipe: Path, overrides: Sequence[str], output: Path) -> int:
    """Bytes at the peak of a few training steps, in this process."""
    (series,) = [series for series in methods() if series.name == name]
    ground = Ground(load_recipe(recipe, [*LITTLE_TEXT, *overrides]), output, Clock(ConsoleProgress()))

    def let_go() -> None:
        ground.forget()
        gc.collect()

    _, cost = train(ground, dataclasses.replace(series.points[0]), seed=0, steps=STEPS, prepared=let_go)
    if cost.peak_bytes is None:
        raise RunFailed("this system does not say what a process's memory was at its peak")
    return cost.peak_bytes
