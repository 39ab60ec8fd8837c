"""`folora-q train`: run a recipe."""

from __future__ import annotations

import shlex
import shutil
import signal
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

import rich_click as click
from rich.markup import escape
from rich.table import Table

from folora_q.cli.console import duration, out, starting
from folora_q.cli.options import recipe_arguments
from folora_q.recipe import Recipe
from folora_q.recipe.strict_yaml import dump_yaml

if TYPE_CHECKING:
    from folora_q.pipeline import RunResult

# What QLoRA's paper and most recipes use.
PLAIN_LEARNING_RATE = "2e-4"


@click.command("train")
@recipe_arguments
@click.option("--overwrite", is_flag=True, help="Replace an earlier run in training.output_dir.")
@click.option("--dry-run", is_flag=True, help="Print the recipe with all defaults and overrides, and stop.")
@click.pass_obj
def command(
    settings: dict[str, bool],
    path: Path,
    overrides: tuple[str, ...],
    recipe: Recipe,
    overwrite: bool,
    dry_run: bool,
) -> None:
    """Fine-tune a model as a RECIPE says, and report what it learned and forgot.

    OVERRIDES change single values of the recipe: gate.enabled=false is plain QLoRA.
    """
    if dry_run:
        # Not through rich, which would wrap long paths.
        click.echo(dump_yaml(recipe.model_dump(mode="json")), nl=False)
        return
    with starting(settings["debug"]) as progress:
        from folora_q.pipeline import run_training

    signal.signal(signal.SIGTERM, signal.default_int_handler)  # `kill` is marked in the run folder like Ctrl-C
    result = run_training(recipe, progress, overwrite)
    _print_result(result, recipe)
    _print_next(path, overrides, recipe, has_answers=bool(result.answers))


def _print_result(result: RunResult, recipe: Recipe) -> None:
    before, after, kept = result.before, result.after, result.divergence
    title = "gated QLoRA" if recipe.gate.enabled else "plain QLoRA"
    table = Table(title=f"What was learned, what was forgotten ({title})", title_justify="left")
    table.add_column("held-out text")
    for heading in ("base", "tuned", "change"):
        table.add_column(heading, justify="right")

    def add(label: str, old: float, new: float, form: str, lower_is_better: bool | None) -> None:
        change = new - old
        good = None if lower_is_better is None or change == 0 else (change < 0) == lower_is_better
        colour = {None: "", True: "green", False: "yellow"}[good]
        table.add_row(
            label,
            format(old, form),
            format(new, form),
            f"[{colour}]{change:+{form}}[/]" if colour else f"{change:+{form}}",
        )

    table.add_section()
    add("task: loss, nats per token", before.task_loss, after.task_loss, ".3f", True)
    if before.exact_match is not None and after.exact_match is not None:
        add("task: exact answers", before.exact_match, after.exact_match, ".1%", False)
    table.add_section()
    add("model's own text: KL from the base", 0.0, kept.start.kl_nats_per_token, ".4f", True)
    add("  the same, cut from the middle", 0.0, kept.crops.kl_nats_per_token, ".4f", True)
    add("  same most likely token", 1.0, kept.start.top1_agreement, ".1%", False)
    add("general text: loss (forgetting)", before.general_loss, after.general_loss, ".4f", True)
    out.print(table)
    for old, new in result.answers[:1]:
        out.print(f"\n[bold]asked[/]  {escape(old.prompt)}", soft_wrap=True)
        out.print(f"[bold]base[/]   {escape(' '.join(old.answer.split())[:200])}", soft_wrap=True)
        out.print(f"[bold]tuned[/]  {escape(new.answer.strip())}", soft_wrap=True)
    longest = sorted(result.seconds.items(), key=lambda item: -item[1])[:3]
    out.print(
        f"\n{duration(sum(result.seconds.values()))} in all: "
        + ", ".join(f"{escape(stage)} {duration(seconds)}" for stage, seconds in longest),
        soft_wrap=True,
    )


def _print_next(path: Path, overrides: Sequence[str], recipe: Recipe, has_answers: bool) -> None:
    """What to type next, in a form that works in the same shell."""
    program = "folora-q" if shutil.which("folora-q") else sys.argv[0]
    if program.endswith(".py"):
        program = f"{sys.executable} {program}"
    folder = Path(recipe.training.output_dir)
    steps = [(f"less {folder}/proxy.jsonl", "the text that the model wrote, which it should go on handling")]
    if has_answers:
        steps.append((f"less {folder}/answers.jsonl", "every held-out answer, before and after"))
    steps.append((f"less {folder}/adapter/README.md", "the model card, with the lines that load the adapter"))
    steps.append((f"{program} chat {shlex.quote(str(folder))} --base", "talk to it, beside its base"))
    steps.append(
        (f"{program} merge {shlex.quote(str(folder))}", "one model out of it, and the proof that it is the adapter")
    )
    if recipe.gate.enabled:
        plain = ["gate.enabled=false", f"training.learning_rate={PLAIN_LEARNING_RATE}"]
        plain.append(f"training.output_dir={folder}-plain")
        line = shlex.join(["train", str(path), *overrides, *plain])
        steps.append((f"{program} {line}", "plain QLoRA, to compare"))
    out.print(f"\n[bold]Next[/]  (the adapter is in [cyan]{escape(str(folder / 'adapter'))}[/])")
    for line, purpose in steps:
        out.print(f"  [dim]# {escape(purpose)}[/]\n  [cyan]{escape(line)}[/]", soft_wrap=True)
