"""Plot loss and forgetting over steps, their trade-off, time, memory and drift."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import LogLocator, MaxNLocator, NullLocator

from folora_q.recipe.objectives import RewardObjective
from folora_q.report.render import in_our_style, titled
from folora_q.report.run_record import Run, StageTime
from folora_q.report.style import ACCENT, INK, LINE, MARKERS, MUTED, SERIES, SURFACE
from folora_q.report.text import memory, short, tick, visible, wall_time
from folora_q.runs.in_words import REWARD_WORDS
from folora_q.runs.results import LayerResult, TextKind

WIDTH = 4.9  # inches: half of a page, or a phone's full width
# Losses that fall by more than this factor are drawn on a logarithmic scale, which shows their end.
LOG_FROM = 8.0
MAX_LABEL_LENGTH = 44
NATS = "nats per token"


def label_of(text: str) -> str:
    """Return a name from a file as a figure's label, shortened."""
    text = visible(text)
    return text if len(text) <= MAX_LABEL_LENGTH else text[: MAX_LABEL_LENGTH - 1] + "…"


def _task_loss(runs: Sequence[Run]) -> str:
    """Return what the task loss of runs is called, with its unit."""
    results = [run.evaluation.preference if run.evaluation else None for run in runs]
    objectives: set[RewardObjective | None] = {None if result is None else result.objective for result in results}
    objective = objectives.pop() if len(objectives) == 1 else None
    if objective is None:
        return f"task loss, {NATS}"
    words = REWARD_WORDS[objective]
    return f"{words.loss}, {words.unit}"


@in_our_style
def training_curves(run: Run) -> Figure:
    """Draw training loss and held-out task loss by step, above the KL from the base."""
    with_kl = [point for point in run.points if point.kl is not None]
    figure = Figure(figsize=(WIDTH, 3.9 if with_kl else 2.6), layout="constrained")
    titled(figure, "Loss and forgetting over steps")
    panels = figure.subplots(1 + bool(with_kl), sharex=True, squeeze=False)[:, 0]
    losses = panels[0]
    if run.train_losses:
        losses.plot(*zip(*run.train_losses, strict=True), color=MUTED, linewidth=1, alpha=0.8, label="training")
    if run.points:
        steps = [point.step for point in run.points]
        losses.plot(steps, [point.loss for point in run.points], label="held out", **line_style(0, len(steps)))
    legend_above(losses)
    _set_loss_scale(losses, "y", [loss for _, loss in run.train_losses] + [point.loss for point in run.points])
    losses.set_ylabel(_task_loss([run]))
    if with_kl:
        steps = [point.step for point in with_kl]
        panels[1].plot(steps, [point.kl for point in with_kl], **line_style(1, len(steps)))
        panels[1].set_ylabel(f"KL, {NATS}")
        panels[1].set_ylim(bottom=0)
    panels[-1].set_xlabel("step")
    panels[-1].xaxis.set_major_locator(MaxNLocator(6, integer=True))
    figure.align_ylabels()
    return figure


@in_our_style
def trade_off(runs: Sequence[Run], names: Sequence[str], equal_loss: float | None = None) -> Figure:
    """Draw forgetting against task loss, one line per run; a star marks the final evaluation."""
    figure = Figure(figsize=(WIDTH, 3.9 + 0.17 * (len(runs) // 2)), layout="constrained")
    titled(figure, "What the task cost")
    axes = figure.subplots()
    losses: list[float] = []
    for number, (run, name) in enumerate(zip(runs, names, strict=True)):
        points = [(point.loss, point.kl) for point in run.points if point.kl is not None]
        style = line_style(number, len(points))
        axes.plot([loss for loss, _ in points], [kl for _, kl in points], label=label_of(name), **style)
        end = run.end
        if end is not None and end.kl is not None:
            star = {"marker": "*", "markersize": 12, "markeredgecolor": SURFACE, "markeredgewidth": 0.8}
            axes.plot([end.loss], [end.kl], color=style["color"], linestyle="none", zorder=5, **star)
            losses.append(end.loss)
        losses += [loss for loss, _ in points]
    if equal_loss is not None:
        axes.axvline(equal_loss, color=MUTED, linewidth=0.8, linestyle=(0, (3, 3)), zorder=1)
        axes.annotate(
            f"equal loss {short(equal_loss)}",
            (equal_loss, 1),
            xycoords=("data", "axes fraction"),
            xytext=(4, -2),
            textcoords="offset points",
            va="top",
            color=MUTED,
        )
    _set_loss_scale(axes, "x", losses)
    axes.set_ylim(bottom=0)
    axes.set_xlabel(f"held-out {_task_loss(runs)}")
    axes.set_ylabel(f"KL from the base on generated text, {NATS}")
    legend_above(axes)
    return figure


@in_our_style
def costs(stages: Sequence[StageTime]) -> Figure:
    """Draw time and peak memory of every stage as bars with numbers."""
    has_memory = any(stage.peak_bytes for stage in stages)
    figure = Figure(figsize=(WIDTH, 0.45 + 0.35 * len(stages)), layout="constrained")
    titled(figure, "Time and peak memory by stage" if has_memory else "Time by stage")
    panels = figure.subplots(1, 1 + has_memory, squeeze=False, width_ratios=[1.5, 1] if has_memory else [1])[0]
    _bars(panels[0], [stage.seconds for stage in stages], [wall_time(stage.seconds) for stage in stages], ACCENT)
    for row, stage in enumerate(stages):
        panels[0].annotate(
            label_of(stage.title),
            (0, row),
            xytext=(0, 5),
            textcoords="offset points",
            va="bottom",
            annotation_clip=False,
        )
    panels[0].set_title("time", color=MUTED)
    if has_memory:
        peaks = [stage.peak_bytes or 0 for stage in stages]
        _bars(panels[1], peaks, [memory(stage.peak_bytes) for stage in stages], MUTED)
        where = " and ".join(sorted({stage.memory for stage in stages if stage.peak_bytes and stage.memory}))
        panels[1].set_title(label_of(f"peak memory, {where}" if where else "peak memory"), color=MUTED)
    return figure


@in_our_style
def predicted_drift(layers: Sequence[LayerResult]) -> Figure:
    """Draw every layer's drift, by the gate's statistics against measured."""
    figure = Figure(figsize=(WIDTH, 3.1), layout="constrained")
    titled(figure, "Drift, by the statistics and measured")
    axes = figure.subplots()
    for number, (kind, name) in enumerate(((TextKind.GENERATED, "generated text"), (TextKind.TASK, "task text"))):
        pairs = [(layer.predicted.get(kind, 0.0), layer.drift.get(kind, 0.0)) for layer in layers]
        pairs = [pair for pair in pairs if all(0 < value < float("inf") for value in pair)]
        if pairs:
            look = {"s": 13, "color": SERIES[number], "marker": MARKERS[number], "alpha": 0.75, "linewidths": 0}
            axes.scatter(*zip(*pairs, strict=True), label=name, **look)
    axes.set_xscale("log")
    axes.set_yscale("log")
    low, high = (pick(*axes.get_xlim(), *axes.get_ylim()) for pick in (min, max))
    axes.plot([low, high], [low, high], color=MUTED, linewidth=0.8, linestyle=(0, (3, 3)), zorder=1)
    axes.set_xlim(low, high)
    axes.set_ylim(low, high)
    axes.set_xlabel("by the gate's statistics")
    axes.set_ylabel("measured on held-out text")
    axes.legend(loc="upper left")
    for axis in (axes.xaxis, axes.yaxis):
        axis.set_major_locator(LogLocator())
        axis.set_major_formatter(tick)
        axis.set_minor_locator(NullLocator())
    return figure


def line_style(number: int, points: int) -> dict[str, Any]:
    """Return the style of the n-th line, with markers if there are few points."""
    style: dict[str, Any] = {"color": SERIES[number % len(SERIES)]}
    if number >= len(SERIES):
        style["linestyle"] = (0, (4, 2))
    if points <= 60:
        style |= {"marker": MARKERS[number % len(MARKERS)], "markersize": 4.2}
        style |= {"markeredgecolor": SURFACE, "markeredgewidth": 0.6}
    return style


def legend_above(axes: Axes) -> None:
    """Put the legend above the panel; long names in one column."""
    labels = axes.get_legend_handles_labels()[1]
    columns = 1 if any(len(label) > MAX_LABEL_LENGTH // 2 for label in labels) else 3
    axes.legend(loc="lower left", bbox_to_anchor=(0, 1), ncols=columns)


def _set_loss_scale(axes: Axes, which: str, losses: Sequence[float]) -> None:
    positive = [loss for loss in losses if loss > 0]
    if len(positive) < len(losses) or not positive or max(positive) < LOG_FROM * min(positive):
        if which == "y":
            axes.set_ylim(bottom=0 if min(losses, default=0) >= 0 else None)
        return
    axis = {"x": axes.xaxis, "y": axes.yaxis}[which]
    (axes.set_xscale if which == "x" else axes.set_yscale)("log")
    axis.set_major_locator(LogLocator(subs=(1, 2, 5)))
    axis.set_major_formatter(tick)
    axis.set_minor_locator(NullLocator())


def _bars(axes: Axes, values: Sequence[float], labels: Sequence[str], colour: str) -> None:
    rows = range(len(values))
    largest = max(values, default=0) or 1
    axes.barh(rows, [largest] * len(values), height=0.16, color=LINE, left=0, linewidth=0)
    axes.barh(rows, values, height=0.16, color=colour, linewidth=0)
    for row, label in zip(rows, labels, strict=True):
        axes.annotate(label, (largest, row), color=INK if colour != MUTED else MUTED, **_above_the_bar("right"))
    axes.set_ylim(len(values) - 0.7, -0.75)
    axes.set_xlim(0, largest)
    axes.grid(False)
    axes.set_xticks([])
    axes.set_yticks([])
    for spine in axes.spines.values():
        spine.set_visible(False)


def _above_the_bar(side: str) -> dict[str, Any]:
    return {"xytext": (0, 5), "textcoords": "offset points", "ha": side, "va": "bottom", "annotation_clip": False}
