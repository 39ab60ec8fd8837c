"""Run everything that has not been run, one seed after another, so that an early stop leaves complete curves."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path

import torch
from peft import PeftModel
from torch import Tensor

from benchmarks.frontier.human_eval import problems
from benchmarks.frontier.measuring import Evaluator, Measured
from benchmarks.frontier.methods.base import Method
from benchmarks.frontier.results import Key, Result, Setting, write
from benchmarks.frontier.series import Series
from benchmarks.frontier.testbed import Testbed
from benchmarks.frontier.training import release, train
from folora_q.data.batch_splitting import ran_out
from folora_q.errors import RunError, first_line
from folora_q.progress import Progress, StageTimer
from folora_q.recipe import load_recipe


@dataclass(frozen=True)
class Plan:
    """The runs of a task.

    Attributes:
        epochs: how often each run sees every training row.
        points: how often each run is measured during training, at equal distances and at the end.
        human_eval: also solve HumanEval's problems with each model.
        share: (n, k): make every k-th run, starting with the n-th, so that processes can share the work.
    """

    recipe: Path
    overrides: Sequence[str]
    series: Sequence[Series]
    seeds: Sequence[int]
    epochs: float
    output: Path
    points: int = 6
    human_eval: bool = False
    share: tuple[int, int] = (0, 1)


class BestPoint:
    """Measures a run during training, and keeps the adapter of the lowest held-out task loss."""

    def __init__(self, evaluator: Evaluator, steps: int, points: int) -> None:
        self.evaluator = evaluator
        self.at = {math.ceil(steps * (n + 1) / points) for n in range(points)}
        self.path: dict[int, Measured] = {}
        self.step, self.loss = 0, math.inf
        self._weights: dict[str, Tensor] = {}

    def __call__(self, step: int, model: PeftModel) -> None:
        """Measure, if it is time.

        Raises:
            RunError: the held-out task loss is not finite.
        """
        if step not in self.at:
            return
        self.path[step] = measured = self.evaluator.losses(model)
        if not math.isfinite(measured.loss["task"]):
            raise RunError(f"the held-out loss is not finite after {step} steps")
        if measured.loss["task"] < self.loss:
            self.step, self.loss = step, measured.loss["task"]
            self._weights = {name: p.detach().clone() for name, p in _trained(model)}

    @torch.no_grad()
    def restore(self, model: PeftModel) -> None:
        """Restore the adapter of the lowest loss."""
        for name, parameter in _trained(model):
            parameter.copy_(self._weights[name])


def _trained(model: PeftModel) -> list[tuple[str, torch.nn.Parameter]]:
    return [(name, p) for name, p in model.named_parameters() if p.requires_grad]


def run_plan(plan: Plan, progress: Progress, tell: Callable[[str], None]) -> None:
    """Make every run of the plan whose file does not exist."""
    recipe = load_recipe(plan.recipe, list(plan.overrides))
    on = Setting.of(plan.recipe, recipe)
    wanted: list[tuple[Path, Key, Series, Method]] = []
    for seed in plan.seeds:
        for series in plan.series:
            for point in series.points:
                key = Key(on, point.settings(), seed, plan.epochs)
                wanted.append((key.path(plan.output), key, series, point))
    missing = [run for run in wanted if not run[0].exists()][plan.share[0] :: plan.share[1]]
    if not missing:
        return
    testbed = Testbed(recipe, plan.output, StageTimer(progress))
    steps = max(1, round(plan.epochs * len(testbed.rows()[0]) / recipe.training.per_device_train_batch_size))
    with testbed.clock.stage("measuring the base", None):
        evaluator = Evaluator(testbed, problems() if plan.human_eval else ())
    for number, (path, key, series, point) in enumerate(missing, 1):
        name = f"{on.task} {number}/{len(missing)}: {series.name}, lr {point.learning_rate:g}, seed {key.seed}"
        best = BestPoint(evaluator, steps, plan.points)
        # A copy: a method stores what it computes for a run.
        try:
            model, cost = train(testbed, dataclasses.replace(point), key.seed, steps, best)
        except (RunError, RuntimeError) as error:
            if isinstance(error, RuntimeError) and not ran_out(error):
                raise
            tell(f"{name}: {first_line(error)}")
            testbed.clear_statistics()  # the covariances and gates of earlier methods may be what fills the memory
            continue
        best.restore(model)
        measured = evaluator.measure(model, best.path[best.step])
        release(point, model)
        result = Result(
            series.name,
            point.learning_rate,
            on.task,
            key.seed,
            steps,
            asdict(evaluator.base),
            asdict(measured),
            preparing=cost.preparing,
            seconds=cost.seconds,
            device=testbed.device_name,
            best_step=best.step,
            path={step: asdict(found) for step, found in best.path.items()},
        )
        write(path, key, result)
        tell(
            f"{name}: best at step {best.step} of {steps}: task {result.task_loss:.4f}, KL {result.kl:.4f}, rise "
            f"{result.mean_rise:+.4f}, ‖ΔW‖ {measured.update_norm:.2f}, exact {measured.exact}, right "
            f"{measured.accuracy:.3f}, HumanEval {measured.human_eval} (base {evaluator.base.human_eval}), "
            f"{cost.seconds:.0f} s"
        )
