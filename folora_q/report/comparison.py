"""Compare runs: at the end of training, and at equal task loss."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass

from folora_q.recipe.objectives import RewardObjective
from folora_q.report import text
from folora_q.report.run_record import Run, StageTime
from folora_q.report.trajectory import Reached, at_loss, equal_loss
from folora_q.runs.in_words import REWARD_WORDS, summary
from folora_q.runs.results import (
    Evaluation,
    Interval,
    KeptResult,
    PairedChange,
    PreferenceResult,
    ScoreResult,
    TextKind,
    TextResult,
)

# Hint for a run without measurements during training.
NO_TRAJECTORY = "train with evaluation.steps set, e.g. evaluation.steps=50, to compare a run at other losses"


@dataclass(frozen=True)
class TableRow:
    """One number of every run.

    Attributes:
        form: format of the number; "time" and "memory" have their own.
        base: the number of the base model.
        estimates: the numbers of the tuned models; None if unknown. Exact numbers have an interval of width zero.
        lower_is_better: None if neither direction is better.
    """

    label: str
    form: str
    base: float | None
    estimates: list[Interval | None]
    lower_is_better: bool | None = True

    @property
    def best(self) -> int | None:
        """Index of the run with the best number, if its interval does not overlap any other."""
        known = [(estimate, n) for n, estimate in enumerate(self.estimates) if estimate is not None]
        known = [(estimate, n) for estimate, n in known if math.isfinite(estimate.value)]
        if self.lower_is_better is None or len(known) < 2:
            return None
        better_first = sorted(known, key=lambda entry: entry[0].value, reverse=not self.lower_is_better)
        (first, number), others = better_first[0], [estimate for estimate, _ in better_first[1:]]
        return number if all(self._is_apart(first, other) for other in others) else None

    def _is_apart(self, better: Interval, other: Interval) -> bool:
        if better.bounds is None or other.bounds is None:
            return False
        return better.bounds[1] < other.bounds[0] if self.lower_is_better else better.bounds[0] > other.bounds[1]


@dataclass(frozen=True)
class AtEqualLoss:
    """Every run when it first reached a task loss that all of them reached; None for a run not measured there."""

    loss: float
    reached: list[Reached | None]
    base_loss: float | None

    @property
    def learned(self) -> bool:
        """Whether the loss is below the base's; otherwise one of the runs learned nothing."""
        return self.base_loss is None or self.loss < self.base_loss


Pick = Callable[[Evaluation], Interval | None]


class _Ends:
    """Rows of the comparison at the end of training; None for a run that was not evaluated."""

    def __init__(self, evaluations: Sequence[Evaluation | None]) -> None:
        self.evaluations = evaluations
        self.known = [found for found in evaluations if found is not None]
        self.rows: list[TableRow] = []

    def add(
        self,
        label: str,
        form: str,
        base: Callable[[Evaluation], float | None],
        tuned: Pick,
        lower_is_better: bool | None = True,
    ) -> None:
        estimates = [None if found is None else tuned(found) for found in self.evaluations]
        known = next((value for value in map(base, self.known) if value is not None), None)
        self.rows.append(TableRow(label, form, known, estimates, lower_is_better))

    def add_losses(self, kind: TextKind) -> None:
        """Add the losses on texts of a kind."""
        for name in _names(self.evaluations, kind):
            label = "task: loss" if name == "task" else f"{name}: loss"
            self.add(label, ".4f", _base_loss(name), _of_text(name, lambda result: result.loss.tuned))

    def add_scores(self, scores: Callable[[Evaluation], Sequence[ScoreResult]]) -> None:
        """Add the scores of answers, by task and metric."""
        for task, metric in dict.fromkeys((s.task, s.metric) for found in self.known for s in scores(found)):

            def of_both(found: Evaluation, key: tuple[str | None, str] = (task, metric)) -> PairedChange | None:
                return next((s.score for s in scores(found) if (s.task, s.metric) == key), None)

            self.add(
                f"{task or 'task'}: {metric_name(metric)}",
                ".1%",
                lambda found, of=of_both: None if (score := of(found)) is None else score.base.value,
                lambda found, of=of_both: None if (score := of(found)) is None else score.tuned,
                lower_is_better=False,
            )

    def add_rewards(self) -> None:
        """Add what is measured on implicit rewards of answers, by objective."""
        for objective, words in REWARD_WORDS.items():
            known = [result for each in self.known if (result := _rewards(each, objective)) is not None]
            if not known:
                continue

            def of(pick: Callable[[PreferenceResult], Interval | None], objective: RewardObjective = objective) -> Pick:
                return lambda found: None if (result := _rewards(found, objective)) is None else pick(result)

            untuned = known[0].loss.base.value
            self.add(f"task: {words.loss}", ".4f", lambda _, loss=untuned: loss, of(lambda result: result.loss.tuned))
            accuracy = of(lambda result: result.accuracy)
            self.add(f"task: {words.accuracy}", ".1%", lambda _: None, accuracy, lower_is_better=False)
            margin = of(lambda result: result.margin)
            self.add("task: margin of rewards", ".3f", lambda _: 0.0, margin, lower_is_better=False)

    def add_forgetting(self) -> None:
        """Add KL and agreement on generated text, and the rise of the loss on general text."""
        for name in _names(self.evaluations, TextKind.GENERATED):
            self.add(f"{name}: KL", ".4f", lambda _: 0.0, _of_text(name, lambda result: result.kl))
            agreement = _of_text(name, lambda result: result.top1_agreement)
            self.add(f"{name}: same top token", ".1%", lambda _: 1.0, agreement, lower_is_better=False)
        for name in _names(self.evaluations, TextKind.GENERAL):
            rise = _of_text(name, lambda result: result.loss.change)
            self.add(f"{name}: rise of the loss", "+.4f", lambda _: 0.0, rise)


def _rewards(found: Evaluation, objective: RewardObjective) -> PreferenceResult | None:
    """Return what was measured on implicit rewards, if it is of this objective."""
    result = found.preference
    return result if result is not None and result.objective == objective else None


def at_ends(runs: Sequence[Run]) -> list[TableRow]:
    """Return the rows of the comparison at the end of training; numbers that no run has are left out."""
    ends = _Ends([run.evaluation for run in runs])
    ends.add_losses(TextKind.TASK)
    ends.add_rewards()
    ends.add_scores(lambda found: [found.score] if found.score is not None else [])
    ends.add_losses(TextKind.EARLIER)
    ends.add_scores(lambda found: found.earlier)
    ends.rows += _kept_rows(ends.known, ends.evaluations)
    ends.add_forgetting()
    ends.add("size of the update, ‖ΔW‖", ".3g", lambda _: None, update_norm, lower_is_better=None)
    ends.rows.append(_exact_row("time", "time", map(total_seconds, runs)))
    ends.rows.append(_exact_row("peak memory", "memory", map(peak_bytes, runs)))
    return [row for row in ends.rows if any(estimate is not None for estimate in row.estimates)]


def _of_text(name: str, pick: Callable[[TextResult], Interval]) -> Pick:
    return lambda found: None if (result := found.text(name)) is None else pick(result)


def _base_loss(name: str) -> Callable[[Evaluation], float | None]:
    return lambda found: None if (result := found.text(name)) is None else result.loss.base.value


def _kept_rows(known: Sequence[Evaluation], all_runs: Sequence[Evaluation | None]) -> list[TableRow]:
    """Return the rows for `keep`: score and KL of each capability, KL of each file.

    Args:
        known: the runs with an evaluation.
    """
    rows: list[TableRow] = []
    for name, metric in dict.fromkeys((kept.name, kept.metric) for found in known for kept in found.kept):
        results = [None if found is None else _kept_by(found, name) for found in all_runs]
        if metric is not None:
            scores = [None if result is None else result.score for result in results]
            base = next((score.base.value for score in scores if score is not None), None)
            tuned = [None if score is None else score.tuned for score in scores]
            rows.append(TableRow(f"keep, {name}: {metric}", ".1%", base, tuned, lower_is_better=False))
        kl = [None if result is None else result.kl for result in results]
        rows.append(TableRow(f"keep, {name}: KL", ".4f", 0.0, kl))
    return rows


def _kept_by(found: Evaluation, name: str) -> KeptResult | None:
    return next((kept for kept in found.kept if kept.name == name), None)


def _exact_row(label: str, form: str, numbers: Iterable[float | None]) -> TableRow:
    """Return a row of numbers without uncertainty."""
    found = [None if value is None else Interval(value, value, value) for value in numbers]
    return TableRow(label, form, None, found, None)


def at_equal_loss(runs: Sequence[Run]) -> AtEqualLoss | None:
    """Compare runs at equal task loss; None if a run has no held-out task loss."""
    courses = [run.course for run in runs]
    loss = equal_loss(courses)
    if loss is None:
        return None
    bases = [run.task_loss.base.value for run in runs if run.task_loss]
    bases += [run.points[0].loss for run in runs if run.points and run.points[0].step == 0]
    return AtEqualLoss(loss, [at_loss(course, loss) for course in courses], min(bases, default=None))


def factor(equal: AtEqualLoss, run: int = 1) -> str | None:
    """Express a run's KL at equal loss as a multiple of the first run's; None if either is unknown or zero."""
    first, other = ((reached.kl or 0.0) if reached else 0.0 for reached in (equal.reached[0], equal.reached[run]))
    if first <= 0 or other <= 0:
        return None
    more = other / first
    return f"{text.short(more)} times" if more >= 1 else f"1/{text.short(1 / more)} of"


def in_words(runs: Sequence[Run], equal: AtEqualLoss | None) -> list[str]:
    """Describe the comparison in sentences: the runs' KL at equal task loss, and each run at its end."""
    names, found = names_of(runs), []
    if equal is not None and equal.learned:
        found += [
            f"At task loss {text.short(equal.loss)}, {names[n]} had {times} the KL of {names[0]}."
            for n in range(1, len(names))
            if (times := factor(equal, n)) is not None
        ]
    for name, run in zip(names, runs, strict=True):
        if run.evaluation is not None:
            found += [f"{name}, at the end: {sentence}" for sentence in summary(run.evaluation)]
    return found


def where(reached: Reached) -> str:
    """Describe how a number at equal loss is known: measured, or interpolated between two steps."""
    moments = ["the end" if point.step is None else f"step {point.step:,}" for point in reached.between]
    return f"interpolated, {moments[0]} to {moments[1]}" if reached.interpolated else f"measured at {moments[0]}"


def written(value: float | None, form: str) -> str:
    """Format a number of a row."""
    if value is None:
        return text.NONE
    if form == "time":
        return text.wall_time(value)
    return text.memory(int(value)) if form == "memory" else text.number(value, form)


def metric_name(metric: str) -> str:
    """Return a metric's name for display."""
    return metric.replace("_", " ")


def update_norm(found: Evaluation) -> Interval | None:
    """Return ‖ΔW‖ over all layers; None if unknown."""
    norms = [layer.update_norm for layer in found.layers if layer.update_norm is not None]
    total = math.sqrt(sum(norm * norm for norm in norms))
    return Interval(total, total, total) if norms else None


def total_seconds(run: Run) -> float | None:
    """Return the wall time of all stages; None where it was not recorded."""
    return sum(stage.seconds for stage in run.stages) if run.stages else None


def peak_stage(run: Run) -> StageTime | None:
    """Return the stage with the highest peak memory, of the device if that was measured."""
    known = [stage for stage in run.stages if stage.peak_bytes]
    of_device = [stage for stage in known if stage.memory == "device"]
    return max(of_device or known, key=lambda stage: stage.peak_bytes or 0, default=None)


def peak_bytes(run: Run) -> float | None:
    """Return the peak memory of the run; None where it was not recorded."""
    stage = peak_stage(run)
    return stage.peak_bytes if stage else None


def names_of(runs: Sequence[Run]) -> list[str]:
    """Return names for display: of the folders, or their paths if names are not unique."""
    names = [run.name for run in runs]
    return [name if names.count(name) == 1 else str(run.folder.path) for name, run in zip(names, runs, strict=True)]


def _names(evaluations: Sequence[Evaluation | None], kind: TextKind) -> list[str]:
    return list(dict.fromkeys(result.name for found in evaluations if found for result in found.of_kind(kind)))
