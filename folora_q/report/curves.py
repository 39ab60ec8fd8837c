"""Plot what an adapter learned against what it forgot, along several paths, and how a budget was spent."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from matplotlib.figure import Figure
from matplotlib.ticker import LogLocator, MaxNLocator, NullFormatter

from folora_q.report.plots import NATS, WIDTH, label_of, legend_above, line_style
from folora_q.report.render import in_our_style, titled
from folora_q.report.spending import SpentBudget
from folora_q.report.style import MUTED
from folora_q.report.text import short, tick

# Values that differ by more than this factor are drawn on a logarithmic scale.
LOG_FROM = 3.0


@in_our_style
def trade_off_curves(
    paths: Mapping[str, Sequence[tuple[float, float]]], title: str = "What the task costs, along the way to the base"
) -> Figure:
    """Draw KL against task loss, one line for each path, on logarithmic scales where values differ by factors.

    Args:
        paths: (loss, KL) of its points in order, by label; those with a KL of 0, the base, are left out.
    """
    figure = Figure(figsize=(1.4 * WIDTH, 4.2), layout="constrained")
    titled(figure, title)
    axes = figure.subplots()
    for number, (label, points) in enumerate(paths.items()):
        shown = [point for point in points if min(point) > 0]
        if shown:
            axes.plot(*zip(*shown, strict=True), label=label_of(label), **line_style(number, len(shown)))
    points = [point for path in paths.values() for point in path if min(point) > 0] or [(1.0, 1.0)]
    scales = (axes.set_xscale, axes.xaxis), (axes.set_yscale, axes.yaxis)
    for (scale, axis), values in zip(scales, zip(*points, strict=True), strict=True):
        if max(values) > LOG_FROM * min(values):
            scale("log")
            axis.set_major_locator(LogLocator(subs=(1.0, 2.0, 5.0)))
            axis.set_major_formatter(tick)
            axis.set_minor_formatter(NullFormatter())
    axes.set_xlabel(f"held-out task loss, {NATS}")
    axes.set_ylabel(f"KL from the base on generated text, {NATS}")
    legend_above(axes)
    return figure


@in_our_style
def spending(budget: SpentBudget) -> Figure:
    """Draw what was spent by step, predicted and measured, and the limit."""
    figure = Figure(figsize=(WIDTH, 2.6), layout="constrained")
    titled(figure, "How the budget was spent")
    axes = figure.subplots()
    if budget.predicted:
        axes.plot(*zip(*budget.predicted, strict=True), color=MUTED, linewidth=1, label="predicted")
    if budget.measured:
        style: dict[str, Any] = line_style(1, len(budget.measured)) | {"linestyle": "none"}
        axes.plot(*zip(*budget.measured, strict=True), label="measured", **style)
    axes.axhline(
        budget.limit, color=MUTED, linewidth=0.8, linestyle=(0, (3, 3)), label=f"budget, {short(budget.limit)}"
    )
    axes.set_ylim(bottom=0)
    axes.set_ylabel(f"{budget.of},\n{NATS}")
    axes.set_xlabel("step")
    axes.xaxis.set_major_locator(MaxNLocator(6, integer=True))
    legend_above(axes)
    return figure
