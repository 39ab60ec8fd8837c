"""`folora-q train`: run a recipe."""

from __future__ import annotations

import shlex
import shutil
import signal
import sys
from pathlib import Path
from types import FrameType
from typing import TYPE_CHECKING

import rich_click as click
from rich.markup import escape

from folora_q.cli.console import out, set_output, starting
from folora_q.cli.evaluation_table import print_answer, print_evaluation
from folora_q.cli.options import recipe_arguments, trust_options
from folora_q.cli.preflight import examined, placed
from folora_q.cli.wording import duration
from folora_q.distributed.launch import launch_line, launched_processes, rank
from folora_q.errors import Terminated, UserError
from folora_q.memory.micro_batches import divided_among
from folora_q.models.trust import Trust
from folora_q.preflight.keeping import examine_keep
from folora_q.recipe import Recipe
from folora_q.recipe.strict_yaml import dump_yaml

if TYPE_CHECKING:
    from folora_q.workflows.train import TrainingResult


@click.command("train")
@recipe_arguments
@click.option("--overwrite", is_flag=True, help="Replace an earlier run in training.output_dir.")
@click.option("--resume", is_flag=True, help="Resume the run in training.output_dir from its last complete checkpoint.")
@click.option(
    "--force", is_flag=True, help="Resume although the recipe, data, model or a library changed. Requires --resume."
)
@click.option("--dry-run", is_flag=True, help="Print the recipe with all defaults and overrides, and exit.")
@click.option("--allow-code", is_flag=True, help="Run the Python file that evaluation.metric_function names.")
@trust_options
@click.pass_obj
def command(
    settings: dict[str, bool],
    path: Path,
    overrides: tuple[str, ...],
    recipe: Recipe,
    overwrite: bool,
    resume: bool,
    force: bool,
    dry_run: bool,
    allow_code: bool,
    trust: Trust,
) -> None:
    """Fine-tune a model according to a RECIPE, and measure what it learned and forgot.

    OVERRIDES change single values of the recipe: gate.enabled=false is plain QLoRA.
    """
    if dry_run:
        # Not through rich, which would wrap long paths.
        click.echo(dump_yaml(recipe.model_dump(mode="json")), nl=False)
        return
    if resume and overwrite:
        raise UserError("--resume continues a run and --overwrite removes it", "give one of them")
    if force and not resume:
        raise UserError("--force requires --resume", "add --resume, or replace the run with --overwrite")
    processes = launched_processes()
    divided_among(recipe, processes)  # now: it is checked again where the run begins
    recipe = placed(recipe, path, overrides, resume, overwrite)
    model = examined(recipe, path, overrides, settings["debug"], ask_the_hub=True)
    examine_keep(recipe)
    if rank():
        set_output(quiet=True, plain=True)  # the first process speaks for all
    with starting(settings["debug"]) as progress:
        from folora_q.workflows.train import TrainingRequest, run_training
    for note in model.notes:
        progress.note(note)

    signal.signal(signal.SIGTERM, _terminate)  # `kill` is marked in the run folder like Ctrl-C
    try:
        request = TrainingRequest(
            recipe=recipe, overwrite=overwrite, resume=resume, force=force, allow_code=allow_code, trust=trust
        )
        result = run_training(request, progress)
    except KeyboardInterrupt as stop:
        if not str(stop):  # nothing has been written
            raise
        options = [*["--allow-code"] * allow_code, *trust.flags(), "--resume"]
        program = _program() if processes == 1 else launch_line()
        line = f"{program} {shlex.join(['train', str(path), *overrides, *options])}"
        raise type(stop)(f"{stop}; resume it with\n  {line}") from None
    if result is not None:
        _print_result(result, recipe)
        _print_next(recipe, trust)


def _terminate(number: int, frame: FrameType | None) -> None:
    raise Terminated


def _program() -> str:
    """Return how this program is called, for lines to copy."""
    program = "folora-q" if shutil.which("folora-q") else sys.argv[0]
    return shlex.join([sys.executable, program] if program.endswith(".py") else [program])


def _print_result(result: TrainingResult, recipe: Recipe) -> None:
    title = "gated QLoRA" if recipe.gate.enabled else "plain QLoRA"
    print_evaluation(result.evaluation, f"What was learned, what was forgotten ({title})")
    for answer in [answer for answer in result.answers if answer.kind == "task"][:1]:
        print_answer(answer)
    for warning in result.warnings:
        out.print(f"[yellow]warning:[/] {escape(warning)}", soft_wrap=True)
    longest = sorted(result.stages, key=lambda stage: -stage.seconds)[:3]
    out.print(
        f"\n{duration(sum(stage.seconds for stage in result.stages))} in all: "
        + ", ".join(f"{escape(stage.title)} {duration(stage.seconds)}" for stage in longest),
        soft_wrap=True,
    )


def _print_next(recipe: Recipe, trust: Trust) -> None:
    """Print the three commands that follow a run, quoted for the shell."""
    program = _program()
    folder = Path(recipe.training.output_dir)
    quoted = shlex.quote(str(folder))
    allowed = "".join(f" {flag}" for flag in trust.flags())
    steps = [
        (f"{program} report {quoted}", "one page: what was learned and forgotten, where the model moved, answers"),
        (f"{program} chat {quoted} --base{allowed}", "talk to the tuned model and to its base"),
        (f"{program} merge {quoted}{allowed}", "an ordinary model; --gguf writes a file for llama.cpp and Ollama too"),
    ]
    out.print(f"\n[bold]Next[/]  (the adapter is in [cyan]{escape(str(folder / 'adapter'))}[/])", soft_wrap=True)
    for line, purpose in steps:
        out.print(f"  [dim]# {escape(purpose)}[/]\n  [cyan]{escape(line)}[/]", soft_wrap=True)
