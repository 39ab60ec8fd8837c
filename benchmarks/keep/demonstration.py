"""Which capabilities survive: plain QLoRA, the default, and the default with `keep`, on one task with one seed.

    python -m benchmarks.keep.demonstration recipes/demo.yaml --model FOLDER --keep tools,code --output runs/keep

All three runs measure the same held-out prompts. The third measures them only (keep.share: 0), so that the second shows
what the share in the penalty adds. A run that is complete is not repeated.
"""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import click

from folora_q.recipe.gate_rules import PLAIN_LEARNING_RATE
from folora_q.runs.folder import RunFolder
from folora_q.runs.result_files import read_evaluation
from folora_q.runs.results import Evaluation, Interval, PairedChange, TextKind

VARIANTS: dict[str, list[str]] = {
    "plain QLoRA": ["gate.enabled=false", f"training.learning_rate={PLAIN_LEARNING_RATE:g}"],
    "default with keep": [],
    "default, keep measured only": ["keep.share=0"],
}


@click.command()
@click.argument("recipe", type=click.Path(exists=True, dir_okay=False, path_type=Path))
@click.option("--model", help="Base model. Default: the recipe's.")
@click.option("--keep", default="tools,refusals,instructions,code,arithmetic,languages", show_default=True)
@click.option("--output", type=click.Path(path_type=Path), required=True, help="Folder of the three runs.")
@click.option("--set", "overrides", multiple=True, help="Override of the recipe, for all runs; can be repeated.")
def main(recipe: Path, model: str | None, keep: str, output: Path, overrides: tuple[str, ...]) -> None:
    """Train the three variants of a RECIPE, and print their numbers as a Markdown table."""
    common = [f"keep=[{keep}]", *overrides, *([f"model.model_name_or_path={model}"] if model else [])]
    found = {
        name: _run(recipe, output / name.replace(" ", "-").replace(",", ""), [*common, *own])
        for name, own in VARIANTS.items()
    }
    click.echo(table(found))


def _run(recipe: Path, folder: Path, overrides: list[str]) -> Evaluation:
    """Train a variant, if it is not there yet, and return its evaluation.

    Raises:
        ClickException: it failed.
    """
    if (earlier := read_evaluation(RunFolder(folder).evaluation)) is not None:
        return earlier
    command = [sys.executable, "-m", "folora_q", "train", str(recipe), *overrides]
    folder.parent.mkdir(parents=True, exist_ok=True)
    with folder.with_name(f"{folder.name}.log").open("w") as log:
        done = subprocess.run([*command, f"training.output_dir={folder}", "--overwrite"], stdout=log)
    found = read_evaluation(RunFolder(folder).evaluation)
    if done.returncode or found is None:
        raise click.ClickException(f"{folder} failed")
    return found


def table(found: dict[str, Evaluation]) -> str:
    """Return a Markdown table: a line for each number, a column for each variant, intervals in parentheses."""
    lines = [["held out", "base", *found], ["---"] * (2 + len(found))]
    first = next(iter(found.values()))
    for text in first.of_kind(TextKind.TASK):
        losses = [result.loss for each in found.values() if (result := each.text(text.name))]
        lines.append(["task: loss", f"{text.loss.base.value:.3f}", *(f"{loss.tuned.value:.3f}" for loss in losses)])
    if first.score is not None:
        lines.append(
            _scores(f"task: {first.score.metric}", [each.score.score for each in found.values() if each.score])
        )
    for text in first.of_kind(TextKind.GENERATED):
        kl = [result.kl for each in found.values() if (result := each.text(text.name))]
        lines.append([f"{text.name}: KL", "0", *map(_number, kl)])
    for number, kept in enumerate(first.kept):
        same = [each.kept[number] for each in found.values()]
        if kept.score is not None:
            lines.append(_scores(f"{kept.name}: {kept.metric}", [each.score for each in same if each.score]))
        lines.append([f"{kept.name}: KL on the base's answers", "0", *(_number(each.kl) for each in same)])
    return "\n".join(f"| {' | '.join(line)} |" for line in lines)


def _scores(label: str, scores: list[PairedChange]) -> list[str]:
    """Return a line of scores, with the interval of each change from the base in points."""
    cells = []
    for score in scores:
        ends = score.change.bounds
        change = "" if ends is None else f" ({100 * ends[0]:+.0f} to {100 * ends[1]:+.0f})"
        cells.append(f"{score.tuned.value:.1%}{change}")
    return [label, f"{scores[0].base.value:.1%}", *cells]


def _number(kl: Interval) -> str:
    return f"{kl.value:.4f}" + ("" if kl.bounds is None else f" ({kl.bounds[0]:.4f} to {kl.bounds[1]:.4f})")


if __name__ == "__main__":
    main()
