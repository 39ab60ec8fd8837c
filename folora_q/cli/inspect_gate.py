"""`folora-q inspect`: show the gates of a run in the terminal."""

from __future__ import annotations

import shlex
from collections.abc import Sequence
from pathlib import Path

import rich_click as click
from rich.markup import escape
from rich.table import Table
from rich.text import Text

from folora_q.cli.console import out, print_table
from folora_q.cli.interference import print_interference
from folora_q.errors import UserError
from folora_q.report.gates import find_gates, heldout_penalties, mean_value, passing, shared_by
from folora_q.report.layers import Quantity, Scale, gate_quantities, layer_quantities, place_of, scale_of
from folora_q.report.run_record import Run, load_run
from folora_q.report.text import number, short, visible
from folora_q.runs.results import GateResult, LayerResult, TextKind

# Both heights and colours show the level.
BARS = "▁▂▃▄▅▆▇█"
COLOURS = ("bright_black", "bright_black", "cyan", "cyan", "blue", "blue", "magenta", "bold red")
LABEL_WIDTH = 16
RANGE_WIDTH = 20
# Number of first and last directions of a gate to show, without --all.
FIRST, LAST = 24, 4
BAR_WIDTH = 24
# Above this ratio of held-out to in-sample penalty the directions are overfitted to the sampled text.
MUCH_OVERFITTED = 3.0


@click.command("inspect")
@click.argument("folder", metavar="RUN", type=click.Path(path_type=Path), help="Folder of a gated run.")
@click.argument(
    "other", metavar="[OTHER]", required=False, help="Another run or adapter: predict how much both interfere if added."
)
@click.option(
    "--module",
    metavar="NAME",
    help="Show one gate in detail: a suffix of a module's name, or a pattern such as '*.3.*.q_proj'.",
)
@click.option("--all", "everything", is_flag=True, help="With --module: show every direction; with OTHER: every layer.")
@click.pass_obj
def command(settings: dict[str, bool], folder: Path, other: str | None, module: str | None, everything: bool) -> None:
    """Show the gates of a run by layer and kind of module, or one gate in detail.

    With OTHER, predict from the covariances of both tasks what each adapter does on the text of the other's task.
    """
    if other is not None:
        print_interference(str(folder), other, everything, settings["debug"])
        return
    run = load_run(folder)
    if not run.gates:
        raise _no_gates(run)
    layers = run.evaluation.layers if run.evaluation else []
    if module is None:
        _print_overview(run, layers)
    else:
        for gate in find_gates(run.gates, module):
            _print_gate(gate, layers, everything, run.rows_placed)


def _no_gates(run: Run) -> UserError:
    if run.gated is False:
        return UserError(
            f"{run.folder.path} is plain QLoRA: it has no gates",
            f"for its drift by layer: folora-q report {shlex.quote(str(run.folder.path))}",
        )
    return UserError(
        f"{run.folder.path} has no gates in {run.folder.gate_results.name}; the run is marked as {run.status}",
        "a gated run writes them before it trains",
    )


def _print_overview(run: Run, layers: Sequence[LayerResult]) -> None:
    rows = run.rows_placed
    strength = ", ".join(sorted({f"{gate.gate_lambda:.4g}" for gate in run.gates}))
    how = f"λ = {strength}" if rows is None else "A frozen"
    out.print(f"[bold]{escape(visible(run.name))}[/]: where the gate bites ({how})", soft_wrap=True)
    moved = [quantity for quantity in layer_quantities(layers) if quantity.key != "norm"]
    drifts = scale_of([value for quantity in moved for value in quantity.grid.values], logarithmic=True)
    for quantity in gate_quantities(run.gates, layers, steps=rows is None):
        _print_grid(quantity, quantity.scale)
    for quantity in moved:
        _print_grid(quantity, drifts)
    over, directions = passing(run.gates)
    modules = sum(len(gate.modules) for gate in run.gates)
    shared = shared_by(run.gates)
    together = f"; {escape(visible(' and '.join(shared)))} share one, as they read one input" if shared else ""
    out.print(f"\n{len(run.gates):,} gates for {modules:,} layers{together}", soft_wrap=True)
    if rows is not None:
        told = f"A reads the {rows} directions of largest γ of each, and stays there"
        shares = "; of Adam's steps each direction gets a share of √γ" if run.rows_scaled else ": no step passes a gate"
        out.print(told + shares, soft_wrap=True)
    elif directions:
        out.print(
            f"{over:,} of {directions:,} directions ({over / directions:.1%}) pass more than half of their step; "
            f"the mean share is {mean_value(run.gates):.1%}",
            soft_wrap=True,
        )
    if (penalties := heldout_penalties(run.gates)) is not None:
        inside, outside = penalties
        ratio = f"{outside / inside:,.1f}"
        out.print(
            f"penalty of A's rows on held-out model-generated text: {ratio} times the in-sample penalty"
            + ("; raise proxy.num_samples" if outside > MUCH_OVERFITTED * inside else ""),
            soft_wrap=True,
        )
    example = escape(visible(run.gates[0].modules[0])) if run.gates[0].modules else "NAME"
    folder = escape(visible(shlex.quote(str(run.folder.path))))
    out.print(f"[dim]one in detail: folora-q inspect {folder} --module {example}[/]", soft_wrap=True)


def _print_grid(quantity: Quantity, scale: Scale) -> None:
    """Print a character for each layer, whose height is its value, and the range of each row."""
    levels = f"{BARS[0]} {short(scale.low)} to {BARS[-1]} {short(scale.high)}"
    levels += ", logarithmic" * quantity.logarithmic
    title = Text(f"\n{quantity.title}", style="bold")
    out.print(title.append(f"  {levels}", style="dim"), soft_wrap=True)
    grid = quantity.grid
    label = min(max(map(len, grid.rows)), LABEL_WIDTH)
    room = max(out.width - label - RANGE_WIDTH - 3, 10)
    every = range(len(grid.columns))
    for places in (every[start : start + room] for start in every[::room]):
        ruler = " " * (label + 1) + _ruler([grid.columns[n] for n in places])
        out.print(Text(ruler, style="dim"), no_wrap=True, crop=False, soft_wrap=True)
        for name, cells in zip(grid.rows, grid.cells, strict=True):
            line = Text(_label(name, label) + " ")
            for n in places:
                line.append(*_cell(cells[n], scale))
            known = [cell for cell in cells if cell is not None]
            line.append(f"  {short(min(known))} to {short(max(known))}", style="dim")
            out.print(line, no_wrap=True, crop=False, soft_wrap=True)


def _cell(value: float | None, scale: Scale) -> tuple[str, str]:
    if value is None:
        return " ", ""
    level = min(int(scale.share(value) * len(BARS)), len(BARS) - 1)
    return BARS[level], COLOURS[level]


def _ruler(columns: Sequence[int | None]) -> str:
    """Return a ruler of layer numbers, as many as fit; a dot is for modules outside of all layers."""
    line = ""
    for place, column in enumerate(columns):
        if column is None:
            line = line.ljust(place) + "."
        elif place >= len(line) + bool(line) and (place == 0 or column % 5 == 0):
            line = line.ljust(place) + str(column)
    return line


def _print_gate(gate: GateResult, layers: Sequence[LayerResult], everything: bool, rows: int | None) -> None:
    """Print a gate's directions and the share that each passes or, for a frozen A, whether A reads it."""
    out.print(f"[bold]{escape(visible(', '.join(gate.modules)))}[/]", soft_wrap=True)
    rest = gate.dim - len(gate.quotients)
    how = f"λ = {gate.gate_lambda:.4g}" if rows is None else f"A reads the first {rows}"
    out.print(f"width {gate.dim:,}; {len(gate.quotients)} directions resolved; {how}")
    table = Table(box=None, padding=(0, 2, 0, 0))
    for heading in ("direction", "quotient γ", "passes" if rows is None else "A reads"):
        table.add_column(heading, justify="right")
    table.add_column("")
    pairs = list(zip(gate.quotients, gate.values, strict=False))
    skipped = range(0) if everything or len(pairs) < 2 * FIRST else range(FIRST, len(pairs) - LAST)
    for n, (quotient, value) in enumerate(pairs):
        if n not in skipped:
            table.add_row(f"{n + 1}", short(quotient), *_passes(value, n, rows))
        elif n == skipped.start:
            table.add_row("...", "", "", f"[dim]{len(skipped)} more: --all[/]")
    if rest > 0:
        passes = _passes(gate.complement_value, gate.dim, rows)
        table.add_row(f"the other {rest:,}", short(gate.complement_quotient), *passes)
    print_table(table)
    over, directions = passing([gate])
    if directions and rows is None:
        share = f"{over:,} of {directions:,} directions pass more than half"
        out.print(f"{share}; the mean share is {gate.mean_value:.1%}", soft_wrap=True)
    ours = [layer for layer in layers if layer.name in gate.modules]
    if ours:
        print_table(_layers_table(ours))
    out.print()


def _passes(value: float, number_of: int, rows: int | None) -> tuple[str, str]:
    """Return the share that a direction passes, with a bar; or whether a frozen A reads it."""
    return (number(value, ".1%"), _bar(value)) if rows is None else ("yes" if number_of < rows else "no", "")


def _layers_table(layers: Sequence[LayerResult]) -> Table:
    table = Table(box=None, padding=(0, 2, 0, 0))
    headings = ("", "drift, generated text", "drift, task text", "energy kept, A", "energy kept, B", "‖ΔW‖")
    for heading in headings:
        table.add_column(heading, justify="right" if heading else "left")
    for layer in layers:
        numbers = (
            short(layer.drift.get(TextKind.GENERATED)),
            short(layer.drift.get("task")),
            number(layer.energy_kept.get("a"), ".1%"),
            number(layer.energy_kept.get("b"), ".1%"),
            short(layer.update_norm),
        )
        table.add_row(escape(visible(place_of(layer.name).kind)), *numbers)
    return table


def _bar(share: float) -> str:
    known = share if 0 <= share <= 1 else 0.0
    return BARS[-1] * round(BAR_WIDTH * known)


def _label(name: str, width: int) -> str:
    name = visible(name)
    return name.ljust(width) if len(name) <= width else name[: width - 1] + "~"
