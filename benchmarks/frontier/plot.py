"""Plot forgetting over task loss, with a line for each run, from its first measurement to its last."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from pathlib import Path

import matplotlib.pyplot as plt
from matplotlib.artist import Artist
from matplotlib.axes import Axes
from matplotlib.ticker import MaxNLocator, NullLocator

from benchmarks.frontier.comparing import MIN_KL, PLAIN
from benchmarks.frontier.methods.replay import BaseKL
from benchmarks.frontier.results import Cell, Result
from benchmarks.frontier.series import methods

# A method has the same colour in every plot. Plain LoRA and ours stand out.
STRONG = {PLAIN: "#000000", "ours": "#1f4fbf", "ours, rank 64": "#0b8f5a", BaseKL.name: "#c2410c"}
# The names of these series for a reader who has not seen the benchmark.
TITLES = {
    PLAIN: "plain QLoRA",
    "ours": "gated (the default, rank 32)",
    "ours, rank 64": "gated, rank 64",
    BaseKL.name: "plain QLoRA with a KL loss",
}
OTHERS = [series.name for series in methods() if series.name not in STRONG]
COLOURS, MARKERS = plt.get_cmap("tab10"), "osD^vPX<>"
VALUES: tuple[Callable[[Result], float], ...] = (lambda run: max(run.kl, MIN_KL), lambda run: run.mean_rise)
LABELS = ("KL(base ‖ tuned), nats per token", "rise of the loss on real text")


def draw(results: Sequence[Result], title: str, path: Path) -> None:
    """Plot KL, and the mean rise of the loss on real text, over the task loss."""
    figure, axes = plt.subplots(1, 2, figsize=(12, 5), layout="constrained")
    for axis, value, label in zip(axes, VALUES, LABELS, strict=True):
        _curves(axis, results, value)
        axis.set_ylabel(label)
    axes[0].set_yscale("log")
    figure.legend(*axes[0].get_legend_handles_labels(), loc="outside right upper", fontsize=8)
    figure.suptitle(title)
    figure.savefig(path, dpi=90)
    plt.close(figure)


def draw_summary(found: Mapping[Cell, Sequence[Result]], path: Path) -> None:
    """Plot KL and rise over the task loss for plain LoRA and ours, with a column for each model and task."""
    figure, axes = plt.subplots(2, len(found), figsize=(5 * len(found), 6.5), layout="constrained", squeeze=False)
    labelled: dict[str, Artist] = {}
    for column, (cell, results) in zip(axes.T, found.items(), strict=True):
        shown = [run for run in results if run.series in STRONG]
        for axis, value in zip(column, VALUES, strict=True):
            _curves(axis, shown, value)
            for run in shown:
                last = run.along()[-1]
                axis.annotate(
                    run.rate, (last.task_loss, value(last)), xytext=(4, 4), textcoords="offset points", fontsize=7
                )
            handles, labels = axis.get_legend_handles_labels()
            labelled |= dict(zip([TITLES[label] for label in labels], handles, strict=True))
        column[0].set_yscale("log")
        column[0].set_xlabel("")
        column[0].set_title(f"{cell.on.task}, {Path(cell.on.model).stem}", fontsize=10)
    for axis, label in zip(axes[:, 0], LABELS, strict=True):
        axis.set_ylabel(label)
    figure.legend(labelled.values(), labelled, loc="outside lower center", ncols=3, fontsize=9)
    path.parent.mkdir(exist_ok=True)
    figure.savefig(path, dpi=90)
    plt.close(figure)


def _curves(axis: Axes, results: Sequence[Result], value: Callable[[Result], float]) -> None:
    named = set()
    for run in results:
        strong, points = run.series in STRONG, run.along()
        place = OTHERS.index(run.series) if run.series in OTHERS else 0
        axis.plot(
            [point.task_loss for point in points],
            [value(point) for point in points],
            color=STRONG.get(run.series) or COLOURS(place % 10),
            linewidth=1.8 if strong else 0.8,
            marker="o" if strong else MARKERS[place % len(MARKERS)],
            markersize=4 if strong else 3,
            label=run.series if run.series not in named else None,
        )
        named.add(run.series)
    axis.set_xscale("log")
    axis.xaxis.set_major_locator(MaxNLocator(4, min_n_ticks=3))
    axis.xaxis.set_minor_locator(NullLocator())
    axis.xaxis.set_major_formatter("{x:.3g}")
    axis.set_xlabel("held-out task loss (learned more: left)")
    axis.grid(alpha=0.2)
