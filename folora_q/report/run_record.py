"""Read a run from its folder, complete or not.

The files are other people's text as much as ours: every key of run.json may be missing or of another type.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, field
from difflib import get_close_matches
from functools import cached_property
from pathlib import Path
from typing import Any

from folora_q.errors import UserError, first_line
from folora_q.recipe.gate_rules import GATE_RULES
from folora_q.recipe.strict_yaml import MAX_RECIPE_LENGTH, parse_yaml
from folora_q.report.spending import SpentBudget, spent_budget
from folora_q.report.trajectory import Point, train_losses, trajectory
from folora_q.runs.folder import RunFolder
from folora_q.runs.result_files import read_answers, read_evaluation, read_gate_results, read_metrics
from folora_q.runs.results import AnswerResult, Evaluation, GateResult, Interval, PairedChange, TextKind, TextResult
from folora_q.storage.untrusted import finite, read_object, read_text


@dataclass(frozen=True)
class StageTime:
    """One stage of a run: seconds, and the peak of memory where it was measured, of the host or the device."""

    title: str
    seconds: float
    peak_bytes: int | None = None
    memory: str = ""


@dataclass(frozen=True)
class Run:
    """The files of a run, as far as they exist.

    Attributes:
        name: of its folder, for display.
        manifest: run.json; empty if missing.
        recipe_text: recipe.resolved.yaml; `recipe` is the parsed content, empty if invalid.
    """

    folder: RunFolder
    name: str
    manifest: dict[str, Any] = field(default_factory=dict)
    recipe_text: str = ""
    recipe: dict[str, Any] = field(default_factory=dict)
    metrics: list[dict[str, Any]] = field(default_factory=list)
    evaluation: Evaluation | None = None
    gates: list[GateResult] = field(default_factory=list)
    answers: list[AnswerResult] = field(default_factory=list)

    def fact(self, *keys: str) -> str | None:
        """Return a text or number of run.json by its keys."""
        value: Any = self.manifest
        for key in keys:
            value = value.get(key) if isinstance(value, dict) else None
        return str(value) if isinstance(value, str | int | float) else None

    @property
    def status(self) -> str:
        return self.fact("status") or "unknown"

    @property
    def gated(self) -> bool | None:
        """Whether the gate was on; None if unknown."""
        if self.gates:
            return True
        gate = self.recipe.get("gate")
        enabled = gate.get("enabled") if isinstance(gate, dict) else None
        return enabled if isinstance(enabled, bool) else None

    @property
    def rows_placed(self) -> int | None:
        """Number of leading directions that a frozen A was initialized with; None for other rules and other starts."""
        gate, adapter = self.recipe.get("gate"), self.recipe.get("adapter")
        if not isinstance(gate, dict) or gate.get("start", "leading") != "leading":
            return None
        rule = GATE_RULES.get(str(gate.get("rule")))
        if rule is None or rule.trains_a:
            return None
        rank = adapter.get("r") if isinstance(adapter, dict) else None
        return rank if isinstance(rank, int) and not isinstance(rank, bool) and rank > 0 else None

    @property
    def rows_scaled(self) -> bool:
        """Whether the lengths of a frozen A's rows gate B's steps."""
        gate = self.recipe.get("gate")
        places = gate.get("places") if isinstance(gate, dict) else None
        return self.rows_placed is not None and isinstance(places, list) and "b_step" in places

    @property
    def finished(self) -> bool:
        """Whether the run, or the evaluation of another adapter, is complete."""
        return self.status in ("complete", "evaluation") and self.evaluation is not None

    @property
    def method(self) -> str:
        if self.status == "evaluation":
            return "evaluation"
        return {True: "gated QLoRA", False: "plain QLoRA", None: "QLoRA"}[self.gated]

    @property
    def base_model(self) -> str | None:
        return self.fact("model", "name") or (self.evaluation.base if self.evaluation else None)

    @property
    def base_label(self) -> str | None:
        """The base model for display: a hub id, or the last part of a path."""
        name = self.base_model
        return Path(name).name if name and Path(name).is_absolute() else name

    @cached_property
    def points(self) -> list[Point]:
        """The measurements during training."""
        return trajectory(self.metrics)

    @cached_property
    def train_losses(self) -> list[tuple[int, float]]:
        return train_losses(self.metrics)

    @cached_property
    def budget(self) -> SpentBudget | None:
        """The forgetting budget and how it was spent; None without one."""
        return spent_budget(self.recipe, self.metrics, self.manifest)

    @property
    def task_text(self) -> TextResult | None:
        """The result on the task's held-out rows, of pairs on the chosen answers, with labels on the desirable ones."""
        return next(iter(self.evaluation.of_kind(TextKind.TASK)), None) if self.evaluation else None

    @property
    def task_loss(self) -> PairedChange | None:
        """The training objective's loss on the task's held-out rows: DPO's or KTO's, or that of the tokens."""
        if self.evaluation is not None and self.evaluation.preference is not None:
            return self.evaluation.preference.loss
        return None if self.task_text is None else self.task_text.loss

    @property
    def generated_text(self) -> TextResult | None:
        """The result on model-generated text in full; cropped text comes after it."""
        return next(iter(self.evaluation.of_kind(TextKind.GENERATED)), None) if self.evaluation else None

    @cached_property
    def end(self) -> Point | None:
        """Task loss and forgetting at the end of the run, from its final evaluation.

        KL and agreement are over all model-generated text, in full and cropped, as during training.
        """
        if self.task_loss is None or not math.isfinite(self.task_loss.tuned.value):
            return None
        generated = self.evaluation.of_kind(TextKind.GENERATED) if self.evaluation else []
        return Point(
            step=None,
            loss=self.task_loss.tuned.value,
            kl=_mean(generated, lambda text: text.kl),
            agreement=_mean(generated, lambda text: text.top1_agreement),
        )

    @cached_property
    def course(self) -> list[Point]:
        """The points during training, and the final evaluation if there were steps after the last point.

        Otherwise it would be the same step twice, on different texts: during training only some are measured.
        """
        steps = [line["step"] for line in self.metrics if isinstance(line.get("step"), int)]
        if self.end is None or (self.points and max(steps) == self.points[-1].step):
            return self.points
        return [*self.points, self.end]

    @cached_property
    def stages(self) -> list[StageTime]:
        """Time and peak memory by stage, in order of time; runs of earlier versions have only times."""
        listed, older = self.manifest.get("stages"), self.manifest.get("seconds")
        if isinstance(listed, list):
            return [stage for entry in listed if (stage := _stage(entry)) is not None]
        entries = older.items() if isinstance(older, dict) else ()
        known = ((title, finite(seconds)) for title, seconds in entries)
        return [StageTime(title, seconds) for title, seconds in known if seconds is not None]


def load_run(path: Path) -> Run:
    """Read a run, finished or not, or the folder of an evaluation.

    Raises:
        UserError: there is no run, or one of its files is damaged.
    """
    folder = RunFolder(path)
    try:
        if not folder.manifest.is_file() and not folder.evaluation.is_file():
            raise _no_run(path)
    except (OSError, ValueError) as error:  # a name that no file can have
        raise UserError(f"there is no run in {path}: {error}") from None
    text, recipe = _recipe(folder.recipe)
    return Run(
        folder=folder,
        name=path.resolve().name,
        manifest=_manifest(folder.manifest),
        recipe_text=text,
        recipe=recipe,
        metrics=read_metrics(folder.metrics),
        evaluation=read_evaluation(folder.evaluation),
        gates=read_gate_results(folder.gate_results),
        answers=read_answers(folder.answers),
    )


def same_base(runs: Iterable[Run]) -> bool | None:
    """Whether all runs started from one base model; None if one does not record it."""
    prints = {run.fact("model", "fingerprint") for run in runs}
    return False if len(prints - {None}) > 1 else None if None in prints else True


def same_data(runs: Iterable[Run]) -> bool:
    """Whether all runs recorded data files of the same content."""
    found = [run.manifest.get("data_sha256") for run in runs]
    sums = [sorted(map(str, checksums.values())) for checksums in found if isinstance(checksums, dict)]
    return all(one == sums[0] for one in sums)


def _mean(texts: Sequence[TextResult], of: Callable[[TextResult], Interval]) -> float | None:
    """Return the mean over the tokens of all texts."""
    tokens = sum(text.tokens for text in texts)
    value = sum(of(text).value * text.tokens for text in texts) / tokens if tokens > 0 else math.nan
    return value if math.isfinite(value) else None


def _no_run(path: Path) -> UserError:
    if path.is_file():
        return UserError(f"{path} is a file", "name the run's folder, which holds run.json")
    if inside := sorted(path.glob("*/run.json")):
        near = [str(manifest.parent) for manifest in inside]
    else:
        siblings = {manifest.parent.name: manifest.parent for manifest in path.parent.glob("*/run.json")}
        near = [str(siblings[name]) for name in get_close_matches(path.name, siblings)]
    what = "it holds no run.json" if path.is_dir() else "no such folder"
    hint = f"did you mean {' or '.join(near[:3])}?" if near else "name the training.output_dir of a recipe that was run"
    return UserError(f"there is no run in {path}: {what}", hint)


def _manifest(path: Path) -> dict[str, Any]:
    try:
        return read_object(path)
    except FileNotFoundError:
        return {}
    except (OSError, ValueError) as error:
        raise UserError(f"{path} cannot be read: {first_line(error)}") from None


def _recipe(path: Path) -> tuple[str, dict[str, Any]]:
    """Return the recipe's text, and its parsed content, empty if invalid."""
    try:
        text = read_text(path, 4 * MAX_RECIPE_LENGTH, errors="replace")
    except FileNotFoundError:
        return "", {}
    except (OSError, ValueError) as error:
        raise UserError(f"{path} cannot be read: {first_line(error)}") from None
    try:
        value = parse_yaml(text)[0]
    except ValueError:
        value = None
    return text, value if isinstance(value, dict) else {}


def _stage(entry: Any) -> StageTime | None:
    seconds = finite(entry.get("seconds")) if isinstance(entry, dict) else None
    if seconds is None:
        return None
    peak = finite(entry.get("peak_bytes")) or 0.0
    return StageTime(
        title=str(entry.get("title")),
        seconds=seconds,
        peak_bytes=int(peak) if peak > 0 else None,
        memory=str(entry.get("memory") or ""),
    )
