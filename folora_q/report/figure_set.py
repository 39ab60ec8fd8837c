"""Choose the figures of a report, with their captions."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import replace

from folora_q.report.heatmaps import heat_map, spectra, spectrum
from folora_q.report.layers import Quantity, gate_quantities, layer_quantities, scale_of
from folora_q.report.plots import costs, predicted_drift, trade_off, training_curves
from folora_q.report.render import Picture
from folora_q.report.run_record import Run
from folora_q.report.text import memory, short, visible, wall_time
from folora_q.report.trajectory import Point
from folora_q.runs.results import GateResult

STAR = " The star is the final evaluation, on all texts."


def course_pictures(run: Run) -> list[Picture]:
    """Loss and forgetting over steps."""
    if not run.train_losses and not run.points:
        return []
    caption = "Training loss as it was logged; held-out task loss as it was measured along training."
    if any(point.kl is not None for point in run.points):
        caption += " Below, KL(base ‖ tuned) on held-out text that the base model wrote."
    elif not run.points:
        caption = "Training loss as it was logged. Nothing was measured along training: evaluation.steps was not set."
    said = [_course(run.points)] if run.points else []
    if run.train_losses:
        (first, start), (last, end) = run.train_losses[0], run.train_losses[-1]
        said.append(f"Training loss {short(start)} at step {first}, {short(end)} at step {last}.")
    return [Picture("course", "Loss and forgetting over steps", caption, " ".join(said), training_curves(run))]


def trade_off_pictures(runs: Sequence[Run], names: Sequence[str], equal_loss: float | None = None) -> list[Picture]:
    """Forgetting against task loss, of all runs that have some of either."""
    shown = [(run, name) for run, name in zip(runs, names, strict=True) if _has_course(run)]
    if not shown:
        return []
    caption = "KL(base ‖ tuned) on the base’s own text against held-out task loss, along training."
    caption += f"{STAR if any(run.end for run, _ in shown) else ''} Lower and further left is better."
    alt = " ".join(f"{visible(name)}: {_course(run.course)}" for run, name in shown)
    figure = trade_off([run for run, _ in shown], [name for _, name in shown], equal_loss)
    return [Picture("trade-off", "What the task cost", caption, alt, figure)]


def layer_pictures(run: Run) -> list[Picture]:
    """Where it moved: heat maps by kind of module and layer, and predicted against measured drift."""
    layers = run.evaluation.layers if run.evaluation else []
    found = list(_heat_maps(layer_quantities(layers)))
    if any(layer.predicted.get(kind, 0) > 0 < drift for layer in layers for kind, drift in layer.drift.items()):
        caption = (
            "A point is a layer. Across: the final update by the gate’s statistics, in which a token counts by the "
            "loss’s gradient (unless gate.covariance is activation). Up: what was measured on held-out text, all "
            "tokens alike. On the dashed line both agree; left of it a layer changed where the loss does not feel it."
        )
        alt = f"Scatter of drift by the statistics and as measured of {len(layers)} layers on logarithmic axes."
        title = "Drift, by the statistics and measured"
        found.append(Picture("drift-predicted", title, caption, alt, predicted_drift(layers)))
    return found


def gate_pictures(run: Run) -> list[Picture]:
    """Where the gate bites: heat maps, and quotients and values of chosen layers for each kind of input."""
    layers, rows = run.evaluation.layers if run.evaluation else [], run.rows_placed
    found = list(_heat_maps(gate_quantities(run.gates, layers, steps=rows is None)))
    for number, (kind, gates) in enumerate(spectra(run.gates)):
        caption = _passing(gates) if rows is None else _read_by_a(gates, rows)
        figure = spectrum(kind, gates, rows)
        found.append(Picture(f"spectrum-{number + 1}", f"Input of {visible(kind)}", caption, caption, figure))
    return found


def _passing(gates: Sequence[tuple[str, GateResult]]) -> str:
    passing = [_within(name, f"{sum(value > 0.5 for value in gate.values)}") for name, gate in gates]
    resolved = sorted({len(gate.values) for _, gate in gates})
    rest = [gate.complement_value for _, gate in gates]
    spread = short(rest[0]) if min(rest) == max(rest) else f"{short(min(rest))} to {short(max(rest))}"
    return (
        f"Of {' or '.join(map(str, resolved))} resolved directions, so many pass more than half of their step: "
        f"{', '.join(passing)}. All other directions pass {spread} of it."
    )


def _read_by_a(gates: Sequence[tuple[str, GateResult]], rows: int) -> str:
    last = [_within(name, short(gate.quotients[:rows][-1])) for name, gate in gates]
    return f"A reads the first {rows} directions, shaded. The last of them has a quotient of {', '.join(last)}."


def _within(panel: str, told: str) -> str:
    return f"{told} in {panel}" if panel else told


def cost_pictures(run: Run) -> list[Picture]:
    """Time and peak memory by stage."""
    if not run.stages:
        return []
    alt = "; ".join(
        f"{stage.title}: {wall_time(stage.seconds)}" + (f", {memory(stage.peak_bytes)}" if stage.peak_bytes else "")
        for stage in run.stages
    )
    with_memory = any(stage.peak_bytes for stage in run.stages)
    caption = "Wall time of every stage" + (", and the largest memory in use during it." if with_memory else ".")
    title = "Time and peak memory by stage" if with_memory else "Time by stage"
    return [Picture("costs", title, caption, alt, costs(run.stages))]


def drift_pictures(runs: Sequence[Run], names: Sequence[str]) -> list[Picture]:
    """Drift by layer of several runs, all on one scale."""
    drifts = [
        (number, quantity)
        for number, run in enumerate(runs)
        for quantity in layer_quantities(run.evaluation.layers if run.evaluation else [])
        if _is_drift(quantity)
    ]
    scale = scale_of([value for _, quantity in drifts for value in quantity.grid.values], logarithmic=True)
    found = []
    for number, quantity in drifts:
        title = f"{visible(names[number])}: {quantity.title[0].lower()}{quantity.title[1:]}"
        caption = f"{quantity.meaning[0].upper()}{quantity.meaning[1:]}. Logarithmic colours, one scale for all."
        figure = heat_map(replace(quantity, title=title), scale)
        found.append(Picture(f"{quantity.key}-{number + 1}", title, caption, _seen(quantity), figure))
    return found


def _heat_maps(found: Sequence[Quantity]) -> Iterator[Picture]:
    drifts = [value for quantity in found if _is_drift(quantity) for value in quantity.grid.values]
    for quantity in found:
        # On one scale, so that it shows where more moved: on task text, as it should be, or on the base's own.
        scale = scale_of(drifts, logarithmic=True) if _is_drift(quantity) else None
        said = " Logarithmic colours." if quantity.logarithmic and scale is None else ""
        said = " Logarithmic colours, one scale for both texts." if scale is not None else said
        caption = f"{quantity.meaning[0].upper()}{quantity.meaning[1:]}.{said}"
        name = f"layers-{quantity.key}"
        yield Picture(name, quantity.title, caption, _seen(quantity), heat_map(quantity, scale))


def _is_drift(quantity: Quantity) -> bool:
    return quantity.key.startswith("drift-")


def _seen(quantity: Quantity) -> str:
    """A heat map in words: its range, and where its largest value is."""
    grid = quantity.grid
    known = [
        (value, row, column)
        for row, cells in zip(grid.rows, grid.cells, strict=True)
        for value, column in zip(cells, grid.columns, strict=True)
        if value is not None
    ]
    value, row, column = max(known, key=lambda entry: entry[0])
    place = visible(row) if column is None else f"{visible(row)} of layer {column}"
    size = f"{len(grid.rows)} kinds of module by {len(grid.columns)} layers"
    return f"Heat map of {size}, from {short(min(grid.values))} to {short(value)}, the largest at {place}."


def _has_course(run: Run) -> bool:
    return any(point.kl is not None for point in [*run.points, *([run.end] if run.end else [])])


def _course(points: Sequence[Point]) -> str:
    """Where a line begins and where it ends, in words."""

    def at(point: Point) -> str:
        moment = "the end" if point.step is None else f"step {point.step}"
        return f"task loss {short(point.loss)}, KL {short(point.kl)} at {moment}"

    return f"from {at(points[0])} to {at(points[-1])}." if len(points) > 1 else f"{at(points[0])}."
