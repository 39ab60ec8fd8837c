"""Plot what an adapter learned against what it forgot, along several paths."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

from matplotlib.figure import Figure

from folora_q.report.plots import NATS, WIDTH, label_of, legend_above, line_style
from folora_q.report.render import in_our_style, titled


@in_our_style
def trade_off_curves(paths: Mapping[str, Sequence[tuple[float, float]]]) -> Figure:
    """Draw KL against task loss, one line for each path.

    Args:
        paths: (loss, KL) of its points in order, by label.
    """
    figure = Figure(figsize=(1.4 * WIDTH, 4.2), layout="constrained")
    titled(figure, "What the task costs, along the way to the base")
    axes = figure.subplots()
    for number, (label, points) in enumerate(paths.items()):
        axes.plot(*zip(*points, strict=True), label=label_of(label), **line_style(number, len(points)))
    axes.set_ylim(bottom=0)
    axes.set_xlabel(f"held-out task loss, {NATS}")
    axes.set_ylabel(f"KL from the base on generated text, {NATS}")
    legend_above(axes)
    return figure
