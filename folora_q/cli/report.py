"""`folora-q report`: a run as one HTML page, with its figures."""

from __future__ import annotations

from pathlib import Path

import rich_click as click
from rich.markup import escape

from folora_q.cli.console import ConsoleProgress, out, visible
from folora_q.cli.pages import check_target, print_page, write
from folora_q.errors import UserError
from folora_q.report.run_record import Run, load_run, same_base

# Suffix of the run folder that `folora-q train` proposes for a plain run.
PLAIN_SUFFIX = "-plain"


@click.command("report")
@click.argument("folder", metavar="RUN", type=click.Path(path_type=Path), help="Run folder, finished or not.")
@click.option(
    "--baseline",
    type=click.Path(path_type=Path),
    help="A run to compare with. Default: RUN-plain, if it exists.",
)
@click.option(
    "--output",
    type=click.Path(path_type=Path),
    help="The HTML file, with its figures in a folder next to it. Default: RUN/report.html.",
)
def command(folder: Path, baseline: Path | None, output: Path | None) -> None:
    """Write a self-contained HTML page about what a run learned and forgot, and its figures as PNG.

    The page of an unfinished run shows what exists so far.
    """
    run = load_run(folder)
    baseline_run = _named_baseline(run, baseline) if baseline is not None else _usual_baseline(run)
    page_file = output or run.folder.report
    figures = run.folder.figures if output is None else output.with_name(f"{output.stem}-figures")
    check_target(page_file)
    progress = ConsoleProgress()
    if baseline_run is not None:
        progress.note(f"compared with {baseline_run.folder.path}, {baseline_run.method}")
    with progress.stage("drawing the report", None):
        from folora_q.report.page import report_page
        from folora_q.report.render import png

        page = report_page(run, baseline_run)
        write(page_file, page.html)
        for picture in page.pictures:
            write(figures / f"{picture.name}.png", png(picture.figure))
    out.print(f"{len(page.pictures)} figures in {escape(visible(str(figures)))}", soft_wrap=True)
    print_page(page_file)


def _named_baseline(run: Run, path: Path) -> Run:
    if path.resolve() == run.folder.path.resolve():
        raise UserError("the baseline is the run itself", "name another run, e.g. one with gate.enabled=false")
    baseline = load_run(path)
    if same_base([run, baseline]) is False:
        raise UserError(
            f"{path} was trained on another base model than {run.folder.path}: {baseline.base_model}, {run.base_model}",
            "name a run of the same base model",
        )
    return baseline


def _usual_baseline(run: Run) -> Run | None:
    """Return the plain run next to this one, named as in docs/getting-started.md, if it exists and can be compared."""
    path = run.folder.path.resolve()
    sibling = path.with_name(path.name + PLAIN_SUFFIX)
    if not path.name or not (sibling / "run.json").is_file():
        return None
    try:
        baseline = load_run(run.folder.path.parent / sibling.name)
    except UserError:
        return None
    return baseline if baseline.evaluation is not None and same_base([run, baseline]) else None
