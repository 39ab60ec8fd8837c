"""Task loss against forgetting, one curve a method: the mean over seeds at each learning rate."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from statistics import mean

import matplotlib.pyplot as plt

from benchmarks.frontier.results import Result

# Ours and what it is most to be compared with stand out; the others are grey, named at their ends.
STRONG = {"LoRA": "#444444", "gated": "#1f6feb", "control": "#d4572a", "TMKL": "#2a8c5a", "FoLoRA": "#8250df"}
GREY, NAMED = "#b8b8b8", "#777777"
VARIANTS_OF_LORA = "LoRA, "


def draw(results: Sequence[Result], path: Path) -> None:
    """A PNG of two panels: KL from the base, and the mean rise on general text."""
    figure, axes = plt.subplots(1, 2, figsize=(13, 5.6), sharex=True)
    for name in dict.fromkeys(result.series for result in results):
        runs = [result for result in results if result.series == name]
        by_rate = [
            [run for run in runs if run.learning_rate == rate] for rate in sorted({run.learning_rate for run in runs})
        ]
        losses = [mean(run.task_loss for run in same) for same in by_rate]
        family = name.replace(":", ",").split(",")[0]
        colour = GREY if name.startswith(VARIANTS_OF_LORA) else STRONG.get(family, GREY)
        style = {"lw": 1, "ms": 3, "zorder": 2} if colour == GREY else {"lw": 1.8, "ms": 4, "zorder": 3}
        end = losses.index(min(losses))
        for axis, value in zip(axes, (lambda run: run.kl, lambda run: run.mean_rise), strict=True):
            heights = [mean(value(run) for run in same) for same in by_rate]
            axis.plot(losses, heights, "o-", color=colour, **style)
            axis.annotate(
                name,
                (losses[end], heights[end]),
                xytext=(3, 3),
                textcoords="offset points",
                fontsize=7,
                color=NAMED if colour == GREY else colour,
            )
    axes[0].set_ylabel("KL(base ‖ tuned) on text of the base's own, nats per token")
    axes[0].set_yscale("log")
    axes[1].set_yscale("symlog", linthresh=0.01)
    axes[1].set_ylabel("rise of the loss on general text, nats per token")
    for axis in axes:
        axis.set_xlabel("task loss, nats per token (lower is better)")
        axis.set_xscale("log")
        axis.grid(alpha=0.25)
        for side in ("top", "right"):
            axis.spines[side].set_visible(False)
    figure.tight_layout()
    figure.savefig(path, dpi=110)
    plt.close(figure)
