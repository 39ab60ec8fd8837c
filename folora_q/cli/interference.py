"""Print how much two adapters are predicted to interfere (`folora-q inspect RUN OTHER`)."""

from __future__ import annotations

from typing import TYPE_CHECKING

from rich.markup import escape
from rich.table import Table

from folora_q.cli.console import out, print_table, starting, visible
from folora_q.report.text import short

if TYPE_CHECKING:
    from folora_q.workflows.together import Interference

# Number of layers to show, without --all.
MOST_TOUCHED = 8


def print_interference(first: str, second: str, everything: bool, debug: bool) -> None:
    """Predict and print both directions.

    Args:
        everything: show every layer, not only those that are touched most.
    """
    with starting(debug):
        from folora_q.workflows.together import predict_interference
    for found in predict_interference(first, second):
        _print_direction(found, everything)
    out.print(
        f"[dim]predicted from the covariances that the gates keep; to measure it: folora-q eval {escape(first)} "
        f"{escape(second)}[/]",
        soft_wrap=True,
    )


def _print_direction(found: Interference, everything: bool) -> None:
    of, by = (escape(visible(name)) for name in (found.of, found.by))
    out.print(
        f"[bold]on the task text of {of}[/], {by} does {found.ratio:.1%} of what {of} does there (E‖ΔWx‖², all layers; "
        f"cosine {found.cosine:+.2f})",
        soft_wrap=True,
    )
    table = Table(box=None, padding=(0, 2, 0, 0))
    for heading in ("layer", "own E‖ΔWx‖²", "the other's", "ratio", "cosine"):
        table.add_column(heading, justify="left" if heading == "layer" else "right")
    layers = sorted(found.layers, key=lambda layer: -layer.other)
    for layer in layers if everything else layers[:MOST_TOUCHED]:
        ratio = f"{layer.other / layer.own:.1%}" if layer.own > 0 else "–"
        scale = (layer.own * layer.other) ** 0.5
        cosine = f"{layer.product / scale:+.2f}" if scale > 0 else "–"
        table.add_row(escape(visible(layer.name)), short(layer.own), short(layer.other), ratio, cosine)
    print_table(table)
    if not everything and len(layers) > MOST_TOUCHED:
        out.print(f"[dim]{len(layers) - MOST_TOUCHED} more: --all[/]")
    if found.unknown:
        out.print(f"{len(found.unknown)} layers that {by} changes have no statistics of this text", soft_wrap=True)
