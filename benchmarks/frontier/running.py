"""Runs what has not been run yet, one after another, seed by seed: an early stop leaves whole curves."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path

from benchmarks.frontier.ground import Ground
from benchmarks.frontier.human_eval import problems
from benchmarks.frontier.measuring import Yardstick
from benchmarks.frontier.methods.base import Method
from benchmarks.frontier.results import Key, Result, Setting, write
from benchmarks.frontier.series import Series
from benchmarks.frontier.training import release, train
from folora_q.data.halving import ran_out
from folora_q.errors import RunFailed, first_line
from folora_q.progress import Clock, Progress
from folora_q.recipe import load_recipe


@dataclass(frozen=True)
class Plan:
    """What is to be run on a task.

    Attributes:
        human_eval: solve HumanEval's problems with each model too.
        share: (n, of): every of-th run from the n-th on, so that processes can share the work.
    """

    recipe: Path
    overrides: Sequence[str]
    series: Sequence[Series]
    seeds: Sequence[int]
    steps: int
    output: Path
    human_eval: bool = False
    share: tuple[int, int] = (0, 1)


def run_plan(plan: Plan, progress: Progress, tell: Callable[[str], None]) -> None:
    """Make every run of the plan whose file is not there."""
    recipe = load_recipe(plan.recipe, list(plan.overrides))
    on = Setting.of(plan.recipe, recipe)
    wanted: list[tuple[Path, Key, Series, Method]] = []
    for seed in plan.seeds:
        for series in plan.series:
            for point in series.points:
                key = Key(on, point.settings(), seed, plan.steps)
                wanted.append((key.path(plan.output), key, series, point))
    missing = [run for run in wanted if not run[0].exists()][plan.share[0] :: plan.share[1]]
    if not missing:
        return
    ground = Ground(recipe, plan.output, Clock(progress))
    with ground.clock.stage("measuring the base", None):
        yardstick = Yardstick(ground, problems() if plan.human_eval else ())
    for number, (path, key, series, point) in enumerate(missing, 1):
        name = f"{on.task} {number}/{len(missing)}: {series.name}, lr {point.learning_rate:g}, seed {key.seed}"
        # A copy: a method keeps what it computes for one run.
        try:
            model, cost = train(ground, dataclasses.replace(point), key.seed, plan.steps)
        except (RunFailed, RuntimeError) as error:
            if isinstance(error, RuntimeError) and not ran_out(error):
                raise
            tell(f"{name}: {first_line(error)}")
            ground.forget()  # whole covariances and gates of the methods before may be what leaves no room
            continue
        measured = yardstick.measure(model)
        release(point, model)
        result = Result(
            series.name,
            point.learning_rate,
            on.task,
            key.seed,
            plan.steps,
            asdict(yardstick.base),
            asdict(measured),
            preparing=cost.preparing,
            seconds=cost.seconds,
            peak_bytes=cost.peak_bytes,
            device=ground.device_name,
        )
        write(path, key, result)
        tell(
            f"{name}: task {result.task_loss:.4f}, KL {result.kl:.4f}, rise {result.mean_rise:+.4f}, ‖ΔW‖ "
            f"{measured.update_norm:.2f}, exact {measured.exact}, right {measured.accuracy:.3f}, HumanEval "
            f"{measured.human_eval} (base {yardstick.base.human_eval}), {cost.seconds:.0f} s"
        )
