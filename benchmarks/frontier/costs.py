"""Measure the time and the peak memory of a few steps of each method, each in a fresh process.

The times of the benchmark's own runs are not comparable: they ran on different days, and several at a time. Statistics
that stay in a process distort its memory. A machine's speed may change by a fifth within minutes, so plain LoRA is
timed before and after each method. Everything that a method computes before its first step and does not need afterwards
is freed first, as in `folora-q train`. On a CPU the peak is the kernel's high-water mark, which includes the libraries.
"""

from __future__ import annotations

import dataclasses
import gc
import json
import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path

from peft import PeftModel

from benchmarks.frontier.methods.base import Method
from benchmarks.frontier.methods.lora import LoRA
from benchmarks.frontier.results import Setting, digest
from benchmarks.frontier.series import methods
from benchmarks.frontier.testbed import Testbed
from benchmarks.frontier.training import Cost, release, train
from benchmarks.performance._process import GIVE_BACK, in_a_process
from folora_q.cli.console import ConsoleProgress
from folora_q.progress import StageTimer
from folora_q.recipe import load_recipe
from folora_q.storage.files import atomic_write

# One of ten steps solves for B's gates.
STEPS = 10
WARM_UP = 3
# The size of a covariance does not depend on the amount of text.
LITTLE_TEXT = ("proxy.num_samples=8", "gate.num_task_samples=8")


@dataclass(frozen=True)
class ComparedCost:
    """The cost of ten steps of a method, and of ten steps of plain LoRA in the same process.

    Attributes:
        plain_seconds: the mean of plain LoRA before and after the method.
    """

    seconds: float
    plain_seconds: float
    peak_bytes: int | None


def measure_all(
    names: Sequence[str], recipe: Path, overrides: Sequence[str], output: Path, tell: Callable[[str], None]
) -> None:
    """Measure series by name, and save the costs next to the runs; those that are saved are not measured again.

    Raises:
        ClickException: a process failed.
    """
    on = Setting.of(recipe, load_recipe(recipe, list(overrides)))
    found = read_costs(output, on)
    for name in names:
        if name in found:
            continue
        arguments = ["costs", "--task", on.task, "--one", name, "--output", str(output), *overrides]
        # Returning memory at once makes a process slower, so time is measured in another one.
        peak = _in_a_process(arguments, GIVE_BACK).peak_bytes
        found[name] = dataclasses.replace(_in_a_process([*arguments, "--timed"], {}), peak_bytes=peak)
        path = costs_path(output, on)
        path.parent.mkdir(parents=True, exist_ok=True)
        text = json.dumps({name: asdict(cost) for name, cost in found.items()}, indent=1, ensure_ascii=False)
        atomic_write(path, text + "\n")
        ratio = found[name].seconds / found[name].plain_seconds
        tell(f"{on.task}: {name}: {ratio:.2f} of plain LoRA's time, {(peak or 0) / 2**20:,.0f} MiB")


def _in_a_process(arguments: Sequence[str], environment: Mapping[str, str]) -> ComparedCost:
    """Return the result of `measure` in a fresh process."""
    found = in_a_process("benchmarks.frontier", *arguments, environment=environment, show_progress=True)
    return ComparedCost(**found)


def read_costs(output: Path, on: Setting) -> dict[str, ComparedCost]:
    """Return the saved costs of the series that have been measured on this setting."""
    path = costs_path(output, on)
    found = json.loads(path.read_text("utf-8")) if path.exists() else {}
    return {name: ComparedCost(**cost) for name, cost in found.items()}


def costs_path(output: Path, on: Setting) -> Path:
    """Return the file of a setting's costs."""
    return output / "costs" / f"{on.task}-{digest(asdict(on))}.json"


def measure(name: str, recipe: Path, overrides: Sequence[str], output: Path, timed: bool) -> ComparedCost:
    """Measure a few training steps of a series in this process.

    Args:
        timed: also time plain LoRA in this process; the peak memory is then that of both.
    """
    (series,) = [series for series in methods() if series.name == name]
    testbed = Testbed(load_recipe(recipe, [*LITTLE_TEXT, *overrides]), output, StageTimer(ConsoleProgress()))

    def free_statistics(step: int, _: PeftModel) -> None:
        if step == 0:
            testbed.clear_statistics()
            gc.collect()

    def cost(method: Method, steps: int = STEPS) -> Cost:
        model, taken = train(testbed, method, seed=0, steps=steps, watch=free_statistics)
        release(method, model)
        return taken

    plain = LoRA(series.points[0].learning_rate)
    if not timed:
        found = cost(dataclasses.replace(series.points[0]))
        return ComparedCost(found.seconds, math.nan, found.peak_bytes)
    cost(plain, WARM_UP)
    before, found, after = cost(plain), cost(dataclasses.replace(series.points[0])), cost(plain)
    return ComparedCost(found.seconds, (before.seconds + after.seconds) / 2, found.peak_bytes)
