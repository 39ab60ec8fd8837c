"""Task loss against forgetting, one curve a method: the mean over seeds at each learning rate."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from statistics import mean
from typing import Any

import matplotlib.pyplot as plt
from matplotlib.ticker import MaxNLocator, NullLocator

from benchmarks.frontier.comparing import PLAIN
from benchmarks.frontier.results import Result
from benchmarks.frontier.series import methods

# Ours and what it is most to be compared with stand out; the others are thin. A method looks the same on every task.
STRONG = {
    "LoRA": ("#000000", "-"),
    "gated, λ 1": ("#6baed6", "--"),
    "gated, λ 4": ("#9ecae1", "-"),
    "gated, λ 16": ("#4a90d9", "-"),
    "gated, λ 64": ("#1f4fbf", "-"),
    "gated, λ 256": ("#0a1f5c", "-"),
    "gated, A frozen": ("#0b8f5a", "-"),
    "gated, A frozen, rank 32": ("#0b8f5a", "--"),
    "gated, A frozen, ridge 0.01": ("#7fbf9a", "-"),
    "gated, A frozen, ridge 0.01, rank 32": ("#7fbf9a", "--"),
    "control: γ shuffled, λ 64": ("#d4572a", "-"),
}
OTHERS = [series.name for series in methods() if series.name not in STRONG]
COLOURS, MARKERS = plt.get_cmap("tab10"), "osD^vPX<>"


def look(name: str) -> dict[str, Any]:
    """How a method's curve is drawn, as `Axes.plot` takes it."""
    if name in STRONG:
        colour, dashes = STRONG[name]
        return {"color": colour, "ls": dashes, "marker": "o", "lw": 2.2, "ms": 4}
    place = OTHERS.index(name)
    return {
        "color": COLOURS(place % COLOURS.N),
        "ls": "-" if place < COLOURS.N else ":",
        "marker": MARKERS[place % len(MARKERS)],
        "lw": 1.0,
        "ms": 5,
    }


def draw(results: Sequence[Result], path: Path) -> None:
    """A PNG of two panels: KL from the base, and the mean rise on general text; one legend for both.

    Runs that learnt less than plain LoRA at each of its rates lie beyond the right edge.
    """
    figure, axes = plt.subplots(1, 2, figsize=(14, 5.8), sharex=True)
    names = {result.series for result in results}
    for name in sorted(names, key=[*STRONG, *OTHERS].index):
        runs = [result for result in results if result.series == name]
        by_rate = [
            [run for run in runs if run.learning_rate == rate] for rate in sorted({run.learning_rate for run in runs})
        ]
        losses = [mean(run.task_loss for run in same) for same in by_rate]
        for axis, value in zip(axes, (lambda run: run.kl, lambda run: run.mean_rise), strict=True):
            heights = [mean(value(run) for run in same) for same in by_rate]
            axis.plot(losses, heights, label=name, **look(name))
    axes[1].legend(loc="center left", bbox_to_anchor=(1.02, 0.5), fontsize=8, frameon=False)
    axes[0].set_ylabel("KL(base ‖ tuned) on text of the base's own, nats per token")
    axes[0].set_yscale("log")
    axes[1].set_yscale("symlog", linthresh=0.01)
    axes[1].set_ylim(bottom=-0.001)
    axes[1].set_ylabel("rise of the loss on general text, nats per token")
    for axis in axes:
        axis.set_xlabel("task loss, nats per token (lower is better)")
        axis.set_xscale("log")
        axis.set_xlim(right=1.02 * max(run.task_loss for run in results if run.series == PLAIN))
        # Losses of a task differ by less than tenfold, where a logarithm's own ticks are none or too many.
        axis.xaxis.set_major_locator(MaxNLocator(8))
        axis.xaxis.set_minor_locator(NullLocator())
        axis.xaxis.set_major_formatter("{x:.3g}")
        axis.grid(alpha=0.25)
        for side in ("top", "right"):
            axis.spines[side].set_visible(False)
    figure.tight_layout()
    figure.savefig(path, dpi=110)
    plt.close(figure)
