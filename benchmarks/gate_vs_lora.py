"""The gate against plain QLoRA at equal task loss: the demo's recipe, gate off at several learning rates, and gate on.

    .venv/bin/python benchmarks/gate_vs_lora.py                 about six minutes a run on two CPU cores, seven runs
    .venv/bin/python benchmarks/gate_vs_lora.py training.max_steps=40     overrides go to every run

A learning rate that is too small forgets nothing because it learns nothing: forgetting is compared at the gated run's
task loss, on the curve that the plain runs draw: both axes in logarithms for the two KLs, straight for the loss rises.
Finished runs in --output are taken as they are if their recipe is the same.
"""

from __future__ import annotations

import ast
import inspect
import json
import math
import textwrap
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

import click
import numpy as np
import yaml
from rich.table import Table

from folora_q.cli.console import ConsoleProgress, err, out, quiet_libraries, quiet_progress_bars

quiet_libraries()  # before they are imported

from folora_q.evaluation.loss import GENERAL_TEXT
from folora_q.pipeline import run_training
from folora_q.recipe import Recipe, load_recipe
from folora_q.runs.folder import RunFolder
from folora_q.runs.results import read_evaluation

PLAIN_LEARNING_RATES = ("1e-4", "2e-4", "5e-4", "1e-3", "2e-3")
# The recipe's own run may learn more than any plain run; this one stops early enough to be compared.
MORE_GATED = "16:1e-3"
TEXT_SIZE = GENERAL_TEXT.stat().st_size


@dataclass(frozen=True)
class Outcome:
    """One run's numbers. Loss rises are after - before, in nats per token, by kind of text."""

    name: str
    gated: bool
    task_loss: float
    exact_match: float
    kl_start: float
    kl_crops: float
    rises: dict[str, float]
    update_norm: float


def real_texts(folder: Path) -> list[Path]:
    """Three kinds of text that no run trains on, all on this machine: prose, manual pages and code."""
    from pydoc_data.topics import topics

    folder.mkdir(parents=True, exist_ok=True)
    manual, code = folder / "manual.txt", folder / "code.txt"
    manual.write_text("\n\n".join(topics[name] for name in sorted(topics))[:TEXT_SIZE], encoding="utf-8")
    code.write_text((inspect.getsource(ast) + inspect.getsource(textwrap))[:TEXT_SIZE], encoding="utf-8")
    prose = folder / "prose.txt"
    prose.write_bytes(GENERAL_TEXT.read_bytes())
    return [prose.absolute(), manual.absolute(), code.absolute()]


def run_once(recipe: Recipe) -> Path:
    """The run folder of a recipe: made now, unless the same recipe was run to its end there before."""
    folder = Path(recipe.training.output_dir)
    try:
        done = json.loads((folder / "run.json").read_text())["status"] == "complete"
        before = yaml.safe_load((folder / "recipe.resolved.yaml").read_text())
    except (OSError, ValueError, KeyError):
        done, before = False, None
    if not done or before != recipe.model_dump(mode="json"):
        run_training(recipe, ConsoleProgress(), overwrite=True)
    return folder


def outcome(name: str, recipe: Recipe) -> Outcome:
    """What a finished run measured of itself."""
    found = read_evaluation(RunFolder(Path(recipe.training.output_dir)).evaluation)
    own = {text.name: text.kl.value for text in found.of_kind("own")}
    norms = [layer.update_norm for layer in found.layers]
    return Outcome(
        name=name,
        gated=recipe.gate.enabled,
        task_loss=found.text("task").loss.tuned.value,
        exact_match=found.score.score.tuned.value,
        kl_start=own["own text"],
        kl_crops=own["own text, cut"],
        rises={text.name: text.loss.change.value for text in found.of_kind("general")},
        update_norm=math.sqrt(sum(norm**2 for norm in norms)),
    )


def at_task_loss(plain: Sequence[Outcome], task_loss: float, value: Callable[[Outcome], float], log: bool) -> float:
    """What plain QLoRA has at a task loss, between its runs; NaN outside their range."""
    x = np.log([o.task_loss for o in plain])
    y = np.array([value(o) for o in plain])
    order = np.argsort(x)
    found = np.interp(
        math.log(task_loss), x[order], np.log(y[order]) if log else y[order], left=math.nan, right=math.nan
    )
    return float(np.exp(found) if log else found)


def tables(outcomes: Sequence[Outcome]) -> list[Table]:
    """All runs; then each gated run beside plain QLoRA at its task loss."""
    kinds = list(outcomes[0].rises)
    measures: dict[str, tuple[Callable[[Outcome], float], bool]] = {
        "KL, own text": (lambda o: o.kl_start, True),
        "KL, crops": (lambda o: o.kl_crops, True),
        **{f"rise, {kind}": (lambda o, kind=kind: o.rises[kind], False) for kind in kinds},
    }
    runs = Table(title="All runs", title_justify="left")
    for column in ("run", "task loss", "exact", *measures, "||ΔW||"):
        runs.add_column(column, justify="left" if column == "run" else "right")
    for o in outcomes:
        cells = [f"{value(o):.4f}" for value, _ in measures.values()]
        runs.add_row(o.name, f"{o.task_loss:.4f}", f"{o.exact_match:.1%}", *cells, f"{o.update_norm:.2f}")

    equal = Table(title="At equal task loss: gated / plain", title_justify="left")
    for column in ("run", "task loss", *measures):
        equal.add_column(column, justify="left" if column == "run" else "right")
    plain = [o for o in outcomes if not o.gated]
    for o in (o for o in outcomes if o.gated):
        cells = []
        for value, log in measures.values():
            reference = at_task_loss(plain, o.task_loss, value, log)
            ratio = "out of range" if math.isnan(reference) else f"{value(o) / reference:.2f}"
            cells.append(f"{value(o):.4f} / {reference:.4f} = {ratio}" if ratio != "out of range" else ratio)
        equal.add_row(o.name, f"{o.task_loss:.4f}", *cells)
    return [runs, equal]


@click.command(help=__doc__)
@click.argument("overrides", nargs=-1)
@click.option("--recipe", "path", type=click.Path(path_type=Path), default=Path("recipes/demo.yaml"))
@click.option("--learning-rates", default=",".join(PLAIN_LEARNING_RATES), help="Of the plain runs.")
@click.option("--gated", default=MORE_GATED, help="More gated runs, as gate_lambda:learning_rate, separated by commas.")
@click.option("--output", type=click.Path(path_type=Path), default=Path("runs/gate_vs_lora"))
def main(overrides: tuple[str, ...], path: Path, learning_rates: str, gated: str, output: Path) -> None:
    settings: dict[str, list[str]] = {"gated, as the recipe": []}
    for pair in filter(None, gated.split(",")):
        strength, rate = pair.split(":")
        settings[f"gated, λ {strength}, lr {rate}"] = [f"gate.gate_lambda={strength}", f"training.learning_rate={rate}"]
    for rate in learning_rates.split(","):
        settings[f"plain, lr {rate}"] = ["gate.enabled=false", f"training.learning_rate={rate}"]

    quiet_progress_bars()
    texts = f"evaluation.general_text=[{','.join(map(str, real_texts(output / 'texts')))}]"
    recipes = {}
    for name, own in settings.items():
        slug = "".join(c if c.isalnum() or c in "-." else "_" for c in name)
        recipes[name] = load_recipe(path, [*overrides, *own, texts, f"training.output_dir={output / slug}"])
    for name, recipe in recipes.items():
        err.print(f"\n[bold]{name}[/]")
        run_once(recipe)
    outcomes = [outcome(name, recipe) for name, recipe in recipes.items()]
    out.width = max(out.width, 140)  # the tables are wide; a file has room
    for table in tables(outcomes):
        out.print(table)


if __name__ == "__main__":
    main()
