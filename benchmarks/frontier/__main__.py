"""Who forgets least, at equal gain on the task? Methods over their learning rates, on one 4-bit base and the same data.

    .venv/bin/python -m benchmarks.frontier run --quick      one task, five runs of 20 steps: some twelve minutes
    .venv/bin/python -m benchmarks.frontier run              everything: some 60 runs for each seed of a task
    .venv/bin/python -m benchmarks.frontier run --ablations  ours with its parts changed one by one
    .venv/bin/python -m benchmarks.frontier costs            time and peak memory of each method's steps
    .venv/bin/python -m benchmarks.frontier drift            which drift on own text predicts the KL
    .venv/bin/python -m benchmarks.frontier table            docs/frontier.md and its plots, from what has been run

What has been run is kept in --output, a file a run; the command goes on where it was stopped. Overrides go to the
task's recipe: `model.model_name_or_path=...` takes another model. Runs of other recipes are made anew and never mixed:
give `table` the overrides that `run` had.
"""

from __future__ import annotations

import json
import os
import shlex
import subprocess
import sys
from dataclasses import asdict
from pathlib import Path

import click

from folora_q.cli.console import ConsoleProgress, err, print_error, quiet_libraries, quiet_progress_bars
from folora_q.errors import FoloraError

quiet_libraries()  # before they are imported

HERE = Path(__file__).parent
TASKS = ("skill", "style", "bookings")
STEPS, QUICK_STEPS = 80, 20
# Less text to read and to measure on; in so few steps no answer comes out wholly right, so none is asked for.
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
@click.option("--quick", is_flag=True, help="Few points, 20 steps, one seed, one task, less text.")
@click.option("--ablations", is_flag=True, help="Ours with its parts changed, in place of the methods.")
@click.option("--task", "tasks", multiple=True, type=click.Choice(TASKS), help="This task alone.")
@click.option("--series", "wanted", multiple=True, help="These series alone, by name or a part of it.")
@click.option("--seeds", default=3, show_default=True)
@click.option("--steps", type=int, help="Optimizer steps of a run.")
@click.option(
    "--human-eval", is_flag=True, help="Solve HumanEval's problems with each model; for models that write code."
)
@click.option("--workers", default=1, show_default=True, help="Processes at once; on a CPU one a core.")
@click.option("--worker", "number", type=int, hidden=True)
@click.option("--output", type=click.Path(path_type=Path), default=OUTPUT, show_default=True)
def run(
    overrides: tuple[str, ...],
    quick: bool,
    ablations: bool,
    tasks: tuple[str, ...],
    wanted: tuple[str, ...],
    seeds: int,
    steps: int | None,
    human_eval: bool,
    workers: int,
    number: int | None,
    output: Path,
) -> None:
    """Run what has not been run."""
    if workers > 1 and number is None:
        os.environ["OMP_NUM_THREADS"] = "1"
        again = [sys.executable, "-m", "benchmarks.frontier", *sys.argv[1:]]
        running = [subprocess.Popen([*again, "--worker", str(n)]) for n in range(workers)]
        sys.exit(max(process.wait() for process in running))
    from benchmarks.frontier import series
    from benchmarks.frontier.running import Plan, run_plan

    chosen = series.quick() if quick else series.ablations() if ablations else series.methods()
    overrides = (*QUICK, *overrides) if quick else overrides
    steps = steps or (QUICK_STEPS if quick else STEPS)
    names = {s.name for s in chosen}
    chosen = [s for s in chosen if not wanted or any(s.name == w or (w not in names and w in s.name) for w in wanted)]
    for task in tasks or TASKS[: 1 if quick else None]:
        plan = Plan(
            recipe=HERE / f"{task}.yaml",
            overrides=overrides,
            series=chosen,
            seeds=range(1 if quick else seeds),
            steps=steps,
            output=output,
            human_eval=human_eval,
            share=(number or 0, workers),
        )
        run_plan(plan, ConsoleProgress(), lambda line: err.print(line))
    if quick and number in (None, 0):
        command = ["table", *overrides, "--steps", str(steps), "--output", str(output)]
        err.print(f"now: .venv/bin/python -m benchmarks.frontier {shlex.join(command)}", soft_wrap=True)


@main.command()
@click.argument("overrides", nargs=-1)
@click.option("--task", default=TASKS[0], type=click.Choice(TASKS), show_default=True)
@click.option("--series", "wanted", multiple=True, help="These series alone, in this order.")
@click.option("--one", help="This series alone, in this process; prints JSON.")
@click.option("--timed", is_flag=True, hidden=True)
@click.option("--output", type=click.Path(path_type=Path), default=OUTPUT, show_default=True)
def costs(
    overrides: tuple[str, ...], task: str, wanted: tuple[str, ...], one: str | None, timed: bool, output: Path
) -> None:
    """Measure time and peak memory of each method's steps, each in a process of its own; leave the machine alone."""
    from benchmarks.frontier.costs import measure, measure_all
    from benchmarks.frontier.series import methods

    recipe = HERE / f"{task}.yaml"
    if one is not None:
        click.echo(json.dumps(asdict(measure(one, recipe, overrides, output, timed))))
        return
    names = wanted or [series.name for series in methods()]
    measure_all(names, recipe, overrides, output, err.print)


@main.command()
@click.argument("overrides", nargs=-1)
@click.option("--task", default=TASKS[0], type=click.Choice(TASKS), show_default=True)
@click.option("--steps", default=STEPS, show_default=True)
@click.option("--output", type=click.Path(path_type=Path), default=OUTPUT, show_default=True)
def drift(overrides: tuple[str, ...], task: str, steps: int, output: Path) -> None:
    """Compare the drift on the base's own text, plain and Fisher-weighted, with the KL that is measured."""
    from benchmarks.frontier.drift import drifts
    from benchmarks.frontier.ground import Ground
    from folora_q.progress import Clock
    from folora_q.recipe import load_recipe

    ground = Ground(load_recipe(HERE / f"{task}.yaml", list(overrides)), output, Clock(ConsoleProgress()))
    for found in drifts(ground, steps):
        click.echo(
            f"{found.method}: drift {found.plain:.1f}, weighted {found.weighted:.2f}, KL {found.kl:.4f}, "
            f"task loss {found.task_loss:.4f}"
        )


@main.command()
@click.argument("overrides", nargs=-1)
@click.option("--output", type=click.Path(path_type=Path), default=OUTPUT, show_default=True)
@click.option("--steps", default=STEPS, show_default=True)
@click.option("--docs", type=click.Path(path_type=Path), help="Write frontier.md and the plots into this folder.")
def table(overrides: tuple[str, ...], output: Path, steps: int, docs: Path | None) -> None:
    """Show what has been run with these overrides."""
    from benchmarks.frontier.results import Setting
    from benchmarks.frontier.tables import show
    from folora_q.recipe import load_recipe

    paths = [HERE / f"{task}.yaml" for task in TASKS]
    show(output, [Setting.of(path, load_recipe(path, list(overrides))) for path in paths], steps, docs)


if __name__ == "__main__":
    try:
        main()
    except FoloraError as error:
        print_error(error.message, error.hint)
        sys.exit(error.exit_code)
