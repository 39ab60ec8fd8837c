"""What a few steps of each method cost, in two processes of its own, one for the time and one for the memory.

Runs are made on several days and beside each other, so their times do not compare, and statistics that stay in a
process blur its memory. A machine's speed may change by a fifth within minutes, so plain LoRA is timed again before and
after each method. What a method computes before its first step is let go of first, as the product does; only what it
keeps for its steps counts. On a CPU the peak is the kernel's high-water mark, libraries and all.
"""

from __future__ import annotations

import dataclasses
import gc
import json
import math
import os
import subprocess
import sys
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path

from peft import PeftModel

from benchmarks.frontier.ground import Ground
from benchmarks.frontier.methods.base import Method
from benchmarks.frontier.methods.lora import LoRA
from benchmarks.frontier.results import Setting, digest
from benchmarks.frontier.series import methods
from benchmarks.frontier.training import Cost, release, train
from benchmarks.performance._process import GIVE_BACK
from folora_q.cli.console import ConsoleProgress
from folora_q.errors import RunError
from folora_q.progress import StageTimer
from folora_q.recipe import load_recipe
from folora_q.storage.files import atomic_write

# B's gates are solved for in every tenth step.
STEPS = 10
WARM_UP = 3
# The size of a covariance does not depend on how much text it is of.
LITTLE_TEXT = ("proxy.num_samples=8", "gate.num_task_samples=8")


@dataclass(frozen=True)
class Beside:
    """What ten steps of a method took, and ten of plain LoRA in the same process: the mean of before and after."""

    seconds: float
    plain_seconds: float
    peak_bytes: int | None


def measure_all(
    names: Sequence[str], recipe: Path, overrides: Sequence[str], output: Path, tell: Callable[[str], None]
) -> None:
    """Measure series, by name, and keep what was found beside the runs; what is there is not measured again.

    Raises:
        RunError: a process failed.
    """
    on = Setting.of(recipe, load_recipe(recipe, list(overrides)))
    found = read_costs(output, on)
    for name in names:
        if name in found:
            continue
        command = [sys.executable, "-m", "benchmarks.frontier", "costs", "--task", on.task, "--one", name]
        command += ["--output", str(output), *overrides]
        weighed = _child(command, GIVE_BACK)
        found[name] = dataclasses.replace(_child([*command, "--timed"], {}), peak_bytes=weighed.peak_bytes)
        path = costs_path(output, on)
        path.parent.mkdir(parents=True, exist_ok=True)
        text = json.dumps({name: asdict(cost) for name, cost in found.items()}, indent=1, ensure_ascii=False)
        atomic_write(path, text + "\n")
        ratio = found[name].seconds / found[name].plain_seconds
        tell(f"{on.task}: {name}: {ratio:.2f} of plain LoRA's time, {(weighed.peak_bytes or 0) / 2**20:,.0f} MiB")


def _child(command: list[str], settings: dict[str, str]) -> Beside:
    """What `measure` finds in a process with these settings; those that give memory back make it slower."""
    child = subprocess.run(command, stdout=subprocess.PIPE, text=True, env=os.environ | settings, check=False)
    if child.returncode:
        raise RunError(f"it could not be measured: {' '.join(command)}")
    return Beside(**json.loads(child.stdout))


def read_costs(output: Path, on: Setting) -> dict[str, Beside]:
    """Of the series that have been measured on this setting."""
    path = costs_path(output, on)
    found = json.loads(path.read_text("utf-8")) if path.exists() else {}
    return {name: Beside(**cost) for name, cost in found.items()}


def costs_path(output: Path, on: Setting) -> Path:
    """Where they are kept."""
    return output / "costs" / f"{on.task}-{digest(asdict(on))}.json"


def measure(name: str, recipe: Path, overrides: Sequence[str], output: Path, timed: bool) -> Beside:
    """Of a few training steps, in this process.

    Args:
        timed: time plain LoRA too, after which the peak is no longer the method's alone.
    """
    (series,) = [series for series in methods() if series.name == name]
    ground = Ground(load_recipe(recipe, [*LITTLE_TEXT, *overrides]), output, StageTimer(ConsoleProgress()))

    def let_go(step: int, _: PeftModel) -> None:
        if step == 0:
            ground.forget()
            gc.collect()

    def cost(method: Method, steps: int = STEPS) -> Cost:
        model, taken = train(ground, method, seed=0, steps=steps, watch=let_go)
        release(method, model)
        return taken

    plain = LoRA(series.points[0].learning_rate)
    if not timed:
        found = cost(dataclasses.replace(series.points[0]))
        return Beside(found.seconds, math.nan, found.peak_bytes)
    cost(plain, WARM_UP)
    before, found, after = cost(plain), cost(dataclasses.replace(series.points[0])), cost(plain)
    return Beside(found.seconds, (before.seconds + after.seconds) / 2, found.peak_bytes)
