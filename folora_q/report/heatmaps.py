"""Heat maps by layer and kind of module, and spectra of gates."""

from __future__ import annotations

from collections.abc import Sequence
from math import isfinite
from typing import Any

from matplotlib.axes import Axes
from matplotlib.colors import ListedColormap, LogNorm, Normalize
from matplotlib.figure import Figure
from matplotlib.ticker import LogLocator, NullLocator

from folora_q.report.layers import Quantity, Scale, joint_name, place_of, short_names
from folora_q.report.plots import WIDTH, label_of
from folora_q.report.render import in_our_style, titled
from folora_q.report.style import ACCENT, MUTED, RAMP, SECOND, SURFACE
from folora_q.report.text import short, tick
from folora_q.runs.results import GateResult

# Panels in a figure of spectra: the first, the middle and the last layer.
PANELS = 3


@in_our_style
def heat_map(quantity: Quantity, scale: Scale | None = None) -> Figure:
    """Draw a quantity by layer; a common `scale` makes several maps comparable."""
    grid, scale = quantity.grid, scale or quantity.scale
    figure = Figure(figsize=(WIDTH, 0.72 + 0.17 * len(grid.rows)), layout="constrained")
    titled(figure, quantity.title)
    axes = figure.subplots()
    low, high = (scale.low, scale.high) if scale.high > scale.low else (scale.low * 0.5 or 0.5, scale.high * 2 or 1.0)
    norm = LogNorm(low, high, clip=True) if scale.logarithmic else Normalize(low, high, clip=True)
    floor = low if scale.logarithmic else float("-inf")
    cells = [[float("nan") if cell is None else max(cell, floor) for cell in row] for row in grid.cells]
    look = {"cmap": ListedColormap(RAMP), "norm": norm, "edgecolors": SURFACE, "linewidth": 0.7}
    mesh = axes.pcolormesh(cells, **look)
    axes.invert_yaxis()
    axes.set_yticks([row + 0.5 for row in range(len(grid.rows))], [label_of(row) for row in grid.rows])
    every = max(1, round(len(grid.columns) / 10))
    shown = [n for n, column in enumerate(grid.columns) if column is None or n % every == 0]
    names = ["other" if grid.columns[n] is None else str(grid.columns[n]) for n in shown]
    axes.set_xticks([n + 0.5 for n in shown], names)
    left: dict[str, Any] = {"xycoords": "axes fraction", "textcoords": "offset points", "ha": "right", "va": "top"}
    axes.annotate("layer", (0, 0), xytext=(-3.5, -3.5), color=MUTED, fontsize=8, **left)
    axes.grid(False)
    for spine in axes.spines.values():
        spine.set_visible(False)
    bar = figure.colorbar(mesh, ax=axes, location="bottom", shrink=0.4, aspect=24, anchor=(1.0, 1.0), pad=0.03)
    bar.outline.set_visible(False)
    bar.set_ticks([low, high], labels=[short(low), short(high)])
    for label, side in zip(bar.ax.get_xticklabels(), ("left", "right"), strict=True):
        label.set_horizontalalignment(side)
    bar.ax.minorticks_off()
    bar.ax.grid(False)
    return figure


@in_our_style
def spectrum(kind: str, gates: Sequence[tuple[str, GateResult]], rows: int | None = None) -> Figure:
    """Draw the quotients of some gates by rank, and the share of a step that each direction passes.

    Args:
        kind: the modules whose inputs these are.
        gates: each with the title of its panel.
        rows: number of directions that a frozen A reads, which are shaded instead of drawing shares.
    """
    figure = Figure(figsize=(WIDTH, 2.1), layout="constrained")
    titled(figure, f"Input of {label_of(kind)}")
    panels = figure.subplots(1, PANELS, sharey=True)
    for number, axes in enumerate(panels):
        if number >= len(gates):
            axes.set_axis_off()
            continue
        name, gate = gates[number]
        _quotients(axes, gate)
        axes.set_title(label_of(name))
        if number == 0:
            axes.set_ylabel("quotient γ", color=ACCENT)
        axes.set_xlabel("direction")
        if rows is not None:
            axes.axvspan(0.5, rows + 0.5, color=SECOND, alpha=0.18, linewidth=0)
        else:
            _shares(axes, gate, labelled=number == len(gates) - 1)
    return figure


def spectra(gates: Sequence[GateResult]) -> list[tuple[str, list[tuple[str, GateResult]]]]:
    """Return for each kind of input the gates of the first, middle and last layer that have one."""
    usable = [gate for gate in gates if gate.modules and _pairs(gate)]
    short_name = short_names(name for gate in usable for name in gate.modules)
    kinds: dict[str, list[tuple[int | None, GateResult]]] = {}
    for gate in usable:
        places = [place_of(name) for name in gate.modules]
        kind = joint_name(list(dict.fromkeys(short_name[place.stem, place.kind] for place in places)))
        kinds.setdefault(kind, []).append((places[0].index, gate))
    found = []
    for kind, members in kinds.items():
        ordered = sorted(members, key=lambda member: -1 if member[0] is None else member[0])
        chosen = dict.fromkeys((0, len(ordered) // 2, len(ordered) - 1))
        named = [("" if ordered[n][0] is None else f"layer {ordered[n][0]}", ordered[n][1]) for n in chosen]
        found.append((kind, named))
    return found


def _pairs(gate: GateResult) -> list[tuple[float, float]]:
    """Return the quotients that a logarithmic axis can show, with their values."""
    return [(q, value) for q, value in zip(gate.quotients, gate.values, strict=False) if isfinite(q) and q > 0]


def _quotients(axes: Axes, gate: GateResult) -> None:
    quotients = [quotient for quotient, _ in _pairs(gate)]
    axes.set_yscale("log")
    axes.set_zorder(2)
    axes.plot(range(1, len(quotients) + 1), quotients, color=ACCENT)
    axes.yaxis.set_major_locator(LogLocator(numticks=5))
    axes.yaxis.set_major_formatter(tick)
    axes.yaxis.set_minor_locator(NullLocator())
    axes.set_xlim(0, len(quotients) + 1)


def _shares(axes: Axes, gate: GateResult, labelled: bool) -> None:
    """Draw the share of a step that passes on a second axis at the right, and the quotient at which it is a half."""
    if gate.gate_lambda > 0:
        axes.axhline(gate.gate_lambda, color=MUTED, linewidth=0.8, linestyle=(0, (3, 3)))
    values = [value for _, value in _pairs(gate)]
    ranks = range(1, len(values) + 1)
    share = axes.twinx()
    share.fill_between(ranks, values, color=SECOND, alpha=0.18, linewidth=0)
    share.plot(ranks, values, color=SECOND, linewidth=1)
    share.set_ylim(0, 1.02)
    share.set_yticks([0, 0.5, 1])
    share.grid(False)
    share.tick_params(labelright=labelled)
    if labelled:
        share.set_ylabel("share that passes", color=SECOND)
