"""Compare what methods forget at equal gain on a task, over their learning rates, on one 4-bit base and the same data.

    .venv/bin/python -m benchmarks.frontier run --quick      one task, five runs of 19 steps
    .venv/bin/python -m benchmarks.frontier run              everything: about 70 runs for each task and seed
    .venv/bin/python -m benchmarks.frontier costs            time and peak memory of each method's steps
    .venv/bin/python -m benchmarks.frontier table            tables of all results; --docs writes the pages

Every run writes a file into --output, and a run whose file exists is not repeated. Overrides change the task's recipe:
`model.model_name_or_path=...` chooses another model. Runs of different recipes are never mixed.
"""

from __future__ import annotations

import json
import os
import shlex
import subprocess
import sys
from dataclasses import asdict, replace
from pathlib import Path

import click

from folora_q.cli.console import ConsoleProgress, err, print_error, quiet_libraries, quiet_progress_bars
from folora_q.errors import FoloraError

quiet_libraries()  # before they are imported

HERE = Path(__file__).parent
TASKS = ("skill", "style", "bookings", "code", "mathematics", "constraints")
# After three epochs the held-out loss has stopped falling.
EPOCHS, QUICK_EPOCHS = 3.0, 0.25
# Less text; and no generated answers, since none would be exactly right after so few steps.
QUICK = (
    "proxy.num_samples=16",
    "proxy.num_heldout_samples=8",
    "gate.num_task_samples=32",
    "evaluation.metric=none",
)
OUTPUT = Path("runs/frontier")


@click.group(help=__doc__)
def main() -> None:
    quiet_progress_bars()


@main.command()
@click.argument("overrides", nargs=-1)
@click.option("--quick", is_flag=True, help="Two methods, a quarter of an epoch, one seed, one task, less text.")
@click.option("--task", "tasks", multiple=True, type=click.Choice(TASKS), help="Only this task.")
@click.option("--series", "wanted", multiple=True, help="Only these series, by name or a part of it.")
@click.option("--rate", "rates", type=float, multiple=True, help="Only these learning rates, if a series has them.")
@click.option("--seeds", default=3, show_default=True)
@click.option("--epochs", type=float, help="How often a run sees every training row.")
@click.option("--points", default=6, show_default=True, help="How often a run is measured during training.")
@click.option(
    "--human-eval", is_flag=True, help="Solve HumanEval's problems with each model; for models that write code."
)
@click.option("--workers", default=1, show_default=True, help="Processes at once; on a CPU one per core.")
@click.option("--worker", "number", type=int, hidden=True)
@click.option("--output", type=click.Path(path_type=Path), default=OUTPUT, show_default=True)
def run(
    overrides: tuple[str, ...],
    quick: bool,
    tasks: tuple[str, ...],
    wanted: tuple[str, ...],
    rates: tuple[float, ...],
    seeds: int,
    epochs: float | None,
    points: int,
    human_eval: bool,
    workers: int,
    number: int | None,
    output: Path,
) -> None:
    """Make all runs that do not exist yet."""
    if workers > 1 and number is None:
        os.environ["OMP_NUM_THREADS"] = "1"
        again = [sys.executable, "-m", "benchmarks.frontier", *sys.argv[1:]]
        running = [subprocess.Popen([*again, "--worker", str(n)]) for n in range(workers)]
        sys.exit(max(process.wait() for process in running))
    from benchmarks.frontier import series
    from benchmarks.frontier.running import Plan, run_plan

    chosen = series.quick() if quick else series.methods()
    overrides = (*QUICK, *overrides) if quick else overrides
    epochs = epochs or (QUICK_EPOCHS if quick else EPOCHS)
    names = {s.name for s in chosen}
    chosen = [s for s in chosen if not wanted or any(s.name == w or (w not in names and w in s.name) for w in wanted)]
    if rates:
        chosen = [replace(s, points=[p for p in s.points if p.learning_rate in rates]) for s in chosen]
    for task in tasks or TASKS[: 1 if quick else None]:
        plan = Plan(
            recipe=HERE / f"{task}.yaml",
            overrides=overrides,
            series=chosen,
            seeds=range(1 if quick else seeds),
            epochs=epochs,
            output=output,
            points=points,
            human_eval=human_eval,
            share=(number or 0, workers),
        )
        run_plan(plan, ConsoleProgress(), lambda line: err.print(line))
    if quick and number in (None, 0):
        command = shlex.join(["table", "--output", str(output)])
        err.print(f"now: .venv/bin/python -m benchmarks.frontier {command}", soft_wrap=True)


@main.command()
@click.argument("overrides", nargs=-1)
@click.option("--task", default=TASKS[0], type=click.Choice(TASKS), show_default=True)
@click.option("--series", "wanted", multiple=True, help="Only these series, in this order.")
@click.option("--one", help="Only this series, in this process; prints JSON.")
@click.option("--timed", is_flag=True, hidden=True)
@click.option("--output", type=click.Path(path_type=Path), default=OUTPUT, show_default=True)
def costs(
    overrides: tuple[str, ...], task: str, wanted: tuple[str, ...], one: str | None, timed: bool, output: Path
) -> None:
    """Measure time and peak memory of each method's steps; nothing else should run on the machine."""
    from benchmarks.frontier.costs import measure, measure_all
    from benchmarks.frontier.series import methods

    recipe = HERE / f"{task}.yaml"
    if one is not None:
        click.echo(json.dumps(asdict(measure(one, recipe, overrides, output, timed))))
        return
    names = wanted or [series.name for series in methods()]
    measure_all(names, recipe, overrides, output, err.print)


@main.command()
@click.option("--output", type=click.Path(path_type=Path), default=OUTPUT, show_default=True)
@click.option("--docs", is_flag=True, help="Write all tables and plots into the repository.")
@click.option("--keep", is_flag=True, help="Add the runs to those in the repository.")
def table(output: Path, docs: bool, keep: bool) -> None:
    """Show all runs, including those in the repository."""
    from benchmarks.frontier.results import KEPT, read_all
    from benchmarks.frontier.tables import show
    from folora_q.storage.files import atomic_write

    lines, found = read_all(output)
    show(found, HERE.parent.parent if docs else None)
    if keep:
        atomic_write(KEPT, "".join(f"{lines[name]}\n" for name in sorted(lines)))


if __name__ == "__main__":
    try:
        main()
    except FoloraError as error:
        print_error(error.message, error.hint)
        sys.exit(error.exit_code)
