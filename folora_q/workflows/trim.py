"""Trim an adapter after training: measure task loss and KL on the way to its base, and save a point. Prints nothing."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import cast

from peft import PeftModel

from folora_q.calibration.gate_store import load_gates
from folora_q.calibration.sample import ProxySample
from folora_q.core import SpectralGate
from folora_q.data.batch_splitting import BatchSplitter
from folora_q.data.task_data import TaskTokens
from folora_q.errors import UserError
from folora_q.evaluation.evaluate import task_batches, whole_and_cut
from folora_q.evaluation.loss import mean_loss
from folora_q.evaluation.model_pair import ModelPair
from folora_q.evaluation.preference import held_out_answers, measure_rewards
from folora_q.models.adapters import wrappers
from folora_q.models.hardware import PeakMemory
from folora_q.models.parts import base_of
from folora_q.models.trust import NOTHING, Trust
from folora_q.progress import Progress, StageTimer
from folora_q.recipe.evaluation import EvaluationSection
from folora_q.recipe.schema import Recipe
from folora_q.report.run_record import load_run
from folora_q.report.trajectory import Point
from folora_q.targets.find import Target, find_target, trimmed_folder
from folora_q.targets.load import LoadedTarget, Precision, fetched, load_target
from folora_q.trimming.paths import BY_QUOTIENTS, PATHS, Update
from folora_q.trimming.points import FEW_SHARES, SHARES, STEPS, Measuring, TrimPoint
from folora_q.trimming.save import save_trimmed
from folora_q.workflows.calibration import Calibration
from folora_q.workflows.evaluate import (
    EvaluationRequest,
    generated_text,
    recipe_of,
    samples_of_run,
    task_of,
    use_template_of,
)

# Directions for which no run has statistics are measured on this many texts that the base generates.
SAMPLES = 64
# With fewer held-out samples of a run, new ones are generated: half of them choose a point, and half report it.
LEAST_HELD_OUT = 8


@dataclass(frozen=True)
class TrimRequest:
    """What to trim, and how.

    Attributes:
        name: a run, or an adapter of any trainer.
        kl: the KL from the base to keep to, in nats per token; None saves nothing.
        recipe: the task and the settings of the statistics; None is the run's own.
        curve: measure enough points for a picture.
        output: None is `trimmed` in the run folder, or a folder next to the adapter's.
        samples: the number of texts to sample from the base, if there is no run with samples.
    """

    name: str
    kl: float | None = None
    recipe: Recipe | None = None
    curve: bool = False
    output: Path | None = None
    overwrite: bool = False
    samples: int = SAMPLES
    dtype: str = "auto"
    trust: Trust = NOTHING


@dataclass(frozen=True)
class TrimResult:
    """What was measured and saved.

    Attributes:
        points: by path, from the complete adapter to little of it.
        chosen: the point with the given KL.
        trajectory: the run's own measurements during training.
        folder: of the trimmed adapter.
    """

    points: list[TrimPoint]
    chosen: TrimPoint | None = None
    trajectory: list[Point] = field(default_factory=list)
    folder: Path | None = None


def run_trim(request: TrimRequest, progress: Progress) -> TrimResult:
    """Measure an adapter along its paths, and save the point with the KL that was asked for.

    Raises:
        UserError: it is not a LoRA adapter, there is no task to take statistics of, or the output already exists.
    """
    return TrimRun(request, StageTimer(progress)).run()


@dataclass(frozen=True)
class PreparedTrim:
    """An adapter with its statistics, and the texts to measure it on."""

    target: Target
    update: Update
    measuring: Measuring


class TrimRun:
    """One trim in reading order: load, get statistics, measure, choose, save."""

    def __init__(self, request: TrimRequest, timer: StageTimer) -> None:
        self.request, self.timer = request, timer
        self.rows = EvaluationSection().batch_size if request.recipe is None else request.recipe.evaluation.batch_size
        self.evaluation = EvaluationRequest(
            request.name, recipe=request.recipe, samples=2 * request.samples, dtype=request.dtype, trust=request.trust
        )

    def run(self) -> TrimResult:
        """Run all steps."""
        request = self.request
        prepared = self.prepare()
        target, update = prepared.target, prepared.update
        points, chosen = self.measure(prepared.measuring)
        folder = request.output or trimmed_folder(target)
        if chosen is not None and target.adapter is not None:
            report = {"adapter": request.name, "kl": request.kl, "chosen": asdict(chosen)}
            report["points"] = [asdict(point) for point in points]
            with update.at(chosen.path, chosen.share):
                save_trimmed(target.adapter, update.pairs, folder, report, target.section.adapter)
        trajectory = [] if target.run is None else load_run(target.run.path).points
        return TrimResult(points, chosen, trajectory, folder if chosen is not None else None)

    def prepare(self) -> PreparedTrim:
        """Load the adapter and its base, get the statistics, and choose the texts."""
        request = self.request
        target = fetched(find_target(request.name))
        if target.adapter is None:
            raise UserError(f"{request.name} is not an adapter", "name a run, or the folder of a PEFT adapter")
        if target.run is not None and target.run.earlier.is_dir() and target.section.adapter is None:
            raise UserError(
                f"{request.name} is an earlier adapter or a sum with one, and only what a run added can be trimmed",
                f"folora-q trim {target.run.path}",
            )
        folder = request.output or trimmed_folder(target)
        if request.kl is not None and folder.exists() and not request.overwrite:
            raise UserError(f"{folder} already exists", "add --overwrite, or name another place with --output")
        recipe = request.recipe or recipe_of(target)
        with self.timer.stage(f"loading {request.name}", None):
            loaded = load_target(target, Precision(request.dtype), compare=True, trust=request.trust)
        self.timer.meter = PeakMemory(loaded.hardware.device)
        use_template_of(request.recipe, loaded)
        model = cast(PeftModel, loaded.model)
        if whole := sorted(wrappers(model)):
            self.timer.note(f"trained in full, and left as it is: {', '.join(whole)}")
        model_pair = ModelPair(model, remember=True)
        data = task_of(self.evaluation, recipe, loaded, model_pair, self.timer)
        seen, held_out, seed = self.generated(loaded, model_pair)
        update = Update(model, self.gates(loaded, recipe, data, seen))
        half = len(held_out) // 2
        splitter = BatchSplitter("measuring", self.timer.warn)
        measuring = Measuring(
            model_pair,
            update,
            chosen_on=whole_and_cut(held_out[:half], seed, self.rows, model.device),
            reported_on=whole_and_cut(held_out[half:], seed, self.rows, model.device),
            task=self.task_loss(recipe, data, model_pair, splitter),
            splitter=splitter,
        )
        return PreparedTrim(target, update, measuring)

    def task_loss(
        self, recipe: Recipe | None, data: TaskTokens | None, model_pair: ModelPair, splitter: BatchSplitter
    ) -> Callable[[], float] | None:
        """Return what measures the loss on held-out rows, that of the task's objective; None without a task."""
        if recipe is None or data is None:
            return None
        device = model_pair.device
        if recipe.training.compares:
            answers = held_out_answers(data.heldout.sequences[:], recipe.training, self.rows, device)
            return lambda: measure_rewards(model_pair, answers, splitter=splitter).loss.tuned.value
        text = task_batches(data, self.rows, device)
        return lambda: mean_loss(base_of(model_pair.model), text, splitter=splitter)

    def generated(self, loaded: LoadedTarget, model_pair: ModelPair) -> tuple[list[ProxySample], list[list[int]], int]:
        """Return model-generated text for the statistics, held-out text, and the seed that crops it."""
        held_out, seed = generated_text(self.evaluation, loaded, model_pair, self.timer, LEAST_HELD_OUT)
        if (sampled := samples_of_run(loaded)) is not None:
            samples, recipe = sampled
            return samples[: recipe.proxy.num_samples], held_out, seed
        half = len(held_out) // 2
        return [ProxySample(ids, "sampled") for ids in held_out[:half]], held_out[half:], seed

    def gates(
        self, loaded: LoadedTarget, recipe: Recipe | None, data: TaskTokens | None, seen: Sequence[ProxySample]
    ) -> Mapping[str, SpectralGate]:
        """Load the run's statistics, or take them now."""
        run, model = loaded.target.run, cast(PeftModel, loaded.model)
        if run is not None and loaded.target.adapter == run.trained and run.gates.is_file():
            self.timer.note(f"statistics read from {run.gates}")
            return load_gates(run.gates, model.device)
        if recipe is None or data is None:
            raise UserError(
                f"there are no statistics of {self.request.name}, and no task to take them of",
                "give the task with --recipe",
            )
        recipe = recipe.changed({"gate": {"enabled": True}})
        on_gpu = loaded.hardware.device.type == "cuda"
        calibration = Calibration(recipe, loaded.tokenizer, data.train.sequences, self.timer, on_gpu)
        return calibration.gates(model, seen)

    def measure(self, measuring: Measuring) -> tuple[list[TrimPoint], TrimPoint | None]:
        """Measure points of every path, and the one with the KL that was asked for."""
        kl, shares = self.request.kl, SHARES if self.request.curve else FEW_SHARES
        passes = len(PATHS) * len(shares) + (0 if kl is None else STEPS + 2)
        chosen = None
        with self.timer.stage("measuring the way to the base", passes, "points") as done:
            measuring = replace(measuring, on_progress=done)
            points = [measuring.point(path, share) for path in PATHS for share in shares]
            if kl is not None:
                chosen = measuring.point(BY_QUOTIENTS, measuring.share_with(kl))
        return points, chosen
