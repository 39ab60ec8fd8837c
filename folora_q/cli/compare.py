"""`folora-q compare`: compare runs at the end of training and at equal task loss."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import rich_click as click
from rich.markup import escape
from rich.table import Table

from folora_q.cli.console import ConsoleProgress, err, out, print_table
from folora_q.cli.pages import check_target, print_page, write
from folora_q.errors import UserError
from folora_q.report.comparison import (
    NO_TRAJECTORY,
    AtEqualLoss,
    TableRow,
    at_ends,
    at_equal_loss,
    in_words,
    names_of,
    where,
    written,
)
from folora_q.report.run_record import Run, load_run, same_base, same_data
from folora_q.report.text import NONE, number, visible

DEFAULT_OUTPUT = Path("compare.html")


@click.command("compare")
@click.argument("folders", nargs=-1, metavar="RUN RUN ...", type=click.Path(path_type=Path), help="Run folders.")
@click.option(
    "--output", default=DEFAULT_OUTPUT, show_default=True, type=click.Path(path_type=Path), help="The HTML file."
)
def command(folders: tuple[Path, ...], output: Path) -> None:
    """Compare runs of one base model: at the end of training, and at equal task loss.

    Forgetting grows while a task is learned, so the run that stopped first forgot least. The fair comparison is what
    each run had forgotten when it first reached the same task loss: the lowest that all of them reached.
    """
    runs = _load(folders)
    check_target(output)
    names, notes = names_of(runs), _notes(runs)
    for note in notes:
        err.print(f"[yellow]note:[/] {escape(visible(note))}", soft_wrap=True)
    out.print("[bold]At the end of training[/]")
    print_table(_ends_table(at_ends(runs), names))
    equal = at_equal_loss(runs)
    _print_equal(equal, names)
    out.print()
    for sentence in in_words(runs, equal):
        out.print(escape(visible(sentence)), soft_wrap=True)
    with ConsoleProgress().stage("drawing the comparison", None):
        from folora_q.report.page import comparison_page

        write(output, comparison_page(runs, notes).html)
    print_page(output)


def _load(folders: Sequence[Path]) -> list[Run]:
    if len(folders) < 2:
        raise UserError("name two runs or more", "for a single run: folora-q report RUN")
    if len({folder.resolve() for folder in folders}) < len(folders):
        raise UserError("a run is named twice")
    runs = [load_run(folder) for folder in folders]
    if same_base(runs) is False:
        bases = "; ".join(f"{run.folder.path}: {run.base_model or 'unknown'}" for run in runs)
        raise UserError(
            f"these runs were trained on different base models, so their numbers cannot be compared ({bases})",
            "name runs whose run.json has the same model.fingerprint",
        )
    return runs


def _notes(runs: Sequence[Run]) -> list[str]:
    """Return the limits of the comparison that a reader must know."""
    notes = []
    if same_base(runs) is None:
        notes.append("not every run records its base model, so it is unknown whether it is the same")
    if not same_data(runs):
        notes.append("these runs had different data, so their losses may be of different texts")
    notes += [
        f"{run.folder.path} has no evaluation; it is marked as {run.status}" for run in runs if not run.evaluation
    ]
    return notes


def _ends_table(rows: Sequence[TableRow], names: Sequence[str]) -> Table:
    table = Table()
    table.add_column("")
    table.add_column("base", justify="right", no_wrap=True)
    for name in names:
        table.add_column(escape(visible(name)), justify="right", overflow="fold")
    for row in rows:
        values = [NONE if found is None else written(found.value, row.form) for found in row.estimates]
        cells = [f"[bold green]{value}[/]" if n == row.best else value for n, value in enumerate(values)]
        table.add_row(escape(visible(row.label)), written(row.base, row.form), *cells)
    return table


def _print_equal(equal: AtEqualLoss | None, names: Sequence[str]) -> None:
    if equal is None or not equal.learned:
        why = "one of the runs has no held-out task loss" if equal is None else "one of the runs learned nothing"
        out.print(f"\nThere is no task loss at which the runs can be compared: {why}.", soft_wrap=True)
        return
    out.print(f"\n[bold]At task loss {number(equal.loss)}[/], the lowest that all of them reached", soft_wrap=True)
    table = Table()
    table.add_column("run", overflow="fold")
    for heading in ("KL, generated text", "same top token"):
        table.add_column(heading, justify="right")
    table.add_column("how it is known")
    for name, reached in zip(names, equal.reached, strict=True):
        label = escape(visible(name))
        if reached is None:
            table.add_row(label, NONE, NONE, "not measured there")
        else:
            table.add_row(label, number(reached.kl), number(reached.agreement, ".1%"), where(reached))
    print_table(table)
    if None in equal.reached:
        out.print(f"{NONE} measured only at its end: {NO_TRAJECTORY}", soft_wrap=True)
