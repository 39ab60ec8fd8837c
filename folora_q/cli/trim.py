"""`folora-q trim`: choose after training how much of an adapter's update stays."""

from __future__ import annotations

import shlex
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

import rich_click as click
from rich.markup import escape
from rich.table import Table

from folora_q.cli.console import out, print_table, starting
from folora_q.cli.options import trust_options
from folora_q.distributed.launch import require_one_process
from folora_q.errors import UserError
from folora_q.models.trust import Trust
from folora_q.recipe import load_recipe
from folora_q.targets.find import find_target, require_reachable

if TYPE_CHECKING:
    from folora_q.trimming.points import TrimPoint
    from folora_q.workflows.trim import TrimResult


@click.command("trim")
@click.argument("name", metavar="WHAT", help="A run, or an adapter of any trainer: a folder or a hub id.")
@click.option("--kl", type=click.FloatRange(min=0, min_open=True), help="Save the adapter shrunk to this KL, in nats.")
@click.option("--curve", type=click.Path(path_type=Path), metavar="FILE", help="Draw the complete trade-off as PNG.")
@click.option(
    "--recipe",
    "path",
    type=click.Path(path_type=Path),
    help="Recipe with the task, for an adapter without a run. Default: the run's own.",
)
@click.option("--output", type=click.Path(path_type=Path), help="Output folder. Default: RUN/trimmed.")
@click.option("--overwrite", is_flag=True, help="Replace an existing output folder.")
@click.option(
    "--samples",
    default=64,
    show_default=True,
    type=click.IntRange(min=16),
    help="Texts to sample, if none are kept.",
)
@click.option(
    "--dtype", type=click.Choice(["auto", "bfloat16", "float16", "float32"]), default="auto", help="Compute dtype."
)
@trust_options
@click.pass_obj
def command(
    settings: dict[str, bool],
    name: str,
    kl: float | None,
    curve: Path | None,
    path: Path | None,
    output: Path | None,
    overwrite: bool,
    samples: int,
    dtype: str,
    trust: Trust,
) -> None:
    """Shrink an adapter's update until the model is near enough to its base, most where it helps the task least.

    Measures held-out task loss and KL from the base on the way, and compares with plain scaling. With --kl it saves
    an ordinary PEFT adapter, which `folora-q merge` takes.
    """
    if curve is not None and curve.suffix != ".png":
        raise UserError(f"{curve} is not a .png file", "name one with --curve")
    recipe = None if path is None else load_recipe(path)
    require_one_process("trim")
    require_reachable(find_target(name))
    with starting(settings["debug"]) as progress:
        from folora_q.workflows.trim import TrimRequest, run_trim
    request = TrimRequest(
        name=name,
        kl=kl,
        recipe=recipe,
        curve=curve is not None,
        output=output,
        overwrite=overwrite,
        samples=samples,
        dtype=dtype,
        trust=trust,
    )
    result = run_trim(request, progress)
    _print_points(result)
    if curve is not None:
        _draw(result, curve)
    _print_next(result, name, kl)


def _print_points(result: TrimResult) -> None:
    from folora_q.trimming.paths import PATHS

    table = Table(title="On the way to the base", title_justify="left")
    table.add_column("penalty that is left", justify="right")
    for path in PATHS.values():
        table.add_column(f"{path.label}: task loss", justify="right")
        table.add_column("KL", justify="right")
    for share in dict.fromkeys(point.share for point in result.points):
        found = {point.path: point for point in result.points if point.share == share}
        table.add_row(f"{share:.1%}", *(text for path in PATHS for text in _numbers(found[path])))
    print_table(table)
    if (chosen := result.chosen) is not None:
        loss, value = _numbers(chosen)
        bounds = chosen.kl.bounds
        interval = "" if bounds is None else f" (95 % interval {bounds[0]:.4f} to {bounds[1]:.4f})"
        out.print(
            f"saved with {chosen.share:.1%} of the penalty: task loss {loss}, KL {value}{interval}, on text that was "
            "not used to choose it",
            soft_wrap=True,
        )


def _numbers(point: TrimPoint) -> tuple[str, str]:
    return "not measured" if point.loss is None else f"{point.loss:.4f}", f"{point.kl.value:.4f}"


def _draw(result: TrimResult, file: Path) -> None:
    from folora_q.report.curves import trade_off_curves
    from folora_q.report.render import png
    from folora_q.storage.files import atomic_write
    from folora_q.trimming.paths import PATHS

    def line(points: Sequence[TrimPoint]) -> list[tuple[float, float]]:
        return [(point.loss, point.kl.value) for point in points if point.loss is not None]

    paths = {path.label: line([p for p in result.points if p.path == name]) for name, path in PATHS.items()}
    during = [(point.loss, point.kl) for point in result.trajectory if point.kl is not None]
    atomic_write(file, png(trade_off_curves({"during training": during} | paths if len(during) > 1 else paths)))
    out.print(f"[green]✓[/] {escape(str(file))}", soft_wrap=True)


def _print_next(result: TrimResult, name: str, kl: float | None) -> None:
    if result.folder is not None:
        line = f"folora-q merge {shlex.quote(str(result.folder))}"
        out.print(f"\n[bold]Next[/]\n  [dim]# an ordinary model[/]\n  [cyan]{escape(line)}[/]", soft_wrap=True)
    elif kl is None:
        line = f"folora-q trim {shlex.quote(name)} --kl 0.01"
        out.print(f"\n[bold]Next[/]\n  [dim]# save it at a KL[/]\n  [cyan]{escape(line)}[/]", soft_wrap=True)
