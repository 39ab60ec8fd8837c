"""Task loss against forgetting, a line for each run, from its first measurement to its last."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import matplotlib.pyplot as plt
from matplotlib.ticker import MaxNLocator, NullLocator

from benchmarks.frontier.comparing import LEAST, PLAIN
from benchmarks.frontier.results import Result
from benchmarks.frontier.series import methods

# A method looks the same on every task. Plain LoRA and ours stand out.
STRONG = {PLAIN: "#000000", "ours": "#1f4fbf", "ours, rank 64": "#0b8f5a"}
OTHERS = [series.name for series in methods() if series.name not in STRONG]
COLOURS, MARKERS = plt.get_cmap("tab10"), "osD^vPX<>"


def draw(results: Sequence[Result], title: str, path: Path) -> None:
    """KL, and the mean rise of the loss on real text, over the task loss."""
    figure, axes = plt.subplots(1, 2, figsize=(12, 5), layout="constrained")
    named = set()
    for run in results:
        strong, points = run.series in STRONG, run.along()
        place = OTHERS.index(run.series) if run.series in OTHERS else 0
        colour = STRONG.get(run.series) or COLOURS(place % 10)
        for axis, value in zip(axes, (lambda r: max(r.kl, LEAST), lambda r: r.mean_rise), strict=True):
            axis.plot(
                [point.task_loss for point in points],
                [value(point) for point in points],
                color=colour,
                linewidth=1.8 if strong else 0.8,
                marker="o" if strong else MARKERS[place % len(MARKERS)],
                markersize=4 if strong else 3,
                label=run.series if run.series not in named else None,
            )
        named.add(run.series)
    for axis, label in zip(axes, ("KL(base ‖ tuned), nats per token", "rise of the loss on real text"), strict=True):
        axis.set_xscale("log")
        axis.xaxis.set_major_locator(MaxNLocator(5, min_n_ticks=3))
        axis.xaxis.set_minor_locator(NullLocator())
        axis.xaxis.set_major_formatter("{x:.3g}")
        axis.set_xlabel("held-out task loss (learned more: left)")
        axis.set_ylabel(label)
        axis.grid(alpha=0.2)
    axes[0].set_yscale("log")
    figure.legend(loc="outside right upper", fontsize=8)
    figure.suptitle(title)
    figure.savefig(path, dpi=90)
    plt.close(figure)
