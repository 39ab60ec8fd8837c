"""`folora-q eval`: measure what any adapter or merged model learned and forgot."""

from __future__ import annotations

import shlex
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Literal

import rich_click as click
from rich.markup import escape

from folora_q.cli.console import out, starting, visible
from folora_q.cli.evaluation_table import print_answer, print_evaluation, print_harness
from folora_q.cli.options import trust_options
from folora_q.data.keep_files import read_keep_files
from folora_q.distributed.launch import require_one_process
from folora_q.errors import RunError, UserError
from folora_q.models.trust import Trust
from folora_q.recipe import load_recipe
from folora_q.recipe.paths import listed
from folora_q.runs.folder import RunFolder
from folora_q.runs.keep_limits import keep_of, load_limits
from folora_q.runs.result_files import answer_lines, read_evaluation, to_json
from folora_q.runs.results import Evaluation, TextKind
from folora_q.targets.find import find_target, require_reachable

if TYPE_CHECKING:
    from folora_q.workflows.evaluate import EvaluationResult

MAX_MOVED_LAYERS = 3
EXISTING_FILE = click.Path(path_type=Path, exists=True, dir_okay=False)


@click.command("eval")
@click.argument("name", metavar="WHAT", help="A run, an adapter, or a merged model: a folder or a hub id.")
@click.argument(
    "other", metavar="[OTHER]", required=False, help="A run or an adapter of the same base, whose change is added."
)
@click.option("--against", metavar="BASE", help="Base model to compare with. Default: the one recorded in WHAT.")
@click.option(
    "--recipe",
    "path",
    type=click.Path(path_type=Path),
    help="Recipe with the task and its metric. Default: the run's own.",
)
@click.option("--text", multiple=True, type=EXISTING_FILE, help="Text file to measure forgetting on; can be repeated.")
@click.option(
    "--samples",
    default=64,
    show_default=True,
    type=click.IntRange(min=4),
    help="Number of texts to sample from the base model.",
)
@click.option(
    "--bits",
    type=click.Choice([4, 16]),
    help="Weight precision in bits. Default: 4 for an adapter, 16 for a merged model.",
)
@click.option(
    "--dtype", type=click.Choice(["auto", "bfloat16", "float16", "float32"]), default="auto", help="Compute dtype."
)
@click.option(
    "--keep", metavar="NAMES", help="Capabilities and files to measure, separated by commas. Default: the recipe's."
)
@click.option(
    "--fail-under", type=EXISTING_FILE, help="YAML file of capabilities with limits; exit with 1 if one is not kept."
)
@click.option("--tasks", metavar="NAMES", help="lm-eval tasks, separated by commas. Requires folora-q[eval].")
@click.option(
    "--tasks-folder", type=click.Path(path_type=Path), help="Folder with your own lm-eval tasks; their code is run."
)
@click.option("--limit", type=click.IntRange(min=1), help="Maximum number of questions of each lm-eval task.")
@click.option(
    "--num-fewshot", type=click.IntRange(min=0), help="Number of few-shot examples before each lm-eval question."
)
@click.option("--chat", "as_chat", is_flag=True, help="Apply the chat template to lm-eval's questions.")
@click.option("--output", type=click.Path(path_type=Path), help="New folder for the results and answers.")
@click.option("--allow-code", is_flag=True, help="Run the Python file that evaluation.metric_function names.")
@trust_options
@click.pass_obj
def command(
    settings: dict[str, bool],
    name: str,
    other: str | None,
    against: str | None,
    path: Path | None,
    text: tuple[Path, ...],
    samples: int,
    bits: Literal[4, 16] | None,
    dtype: str,
    keep: str | None,
    fail_under: Path | None,
    tasks: str | None,
    tasks_folder: Path | None,
    limit: int | None,
    num_fewshot: int | None,
    as_chat: bool,
    output: Path | None,
    allow_code: bool,
    trust: Trust,
) -> None:
    """Measure what a tuned model learned and forgot compared with its base.

    WHAT can come from any trainer: a run of folora-q, a PEFT adapter, or a merged model. The KL divergence is measured
    on text sampled from the base model: the run's own, or new samples. With OTHER, the sum of two adapters is measured
    on the tasks of both.
    """
    recipe = None if path is None else load_recipe(path)
    limits = None if fail_under is None else load_limits(fail_under)
    measured = None if keep is None else keep_of(_names(keep), Path.cwd(), "--keep")
    for section in filter(None, (measured, limits and limits.section)):
        read_keep_files(section.files)
    if output is not None and output.exists():
        raise UserError(f"{output} already exists", "name another folder with --output")
    require_one_process("eval")
    for named in filter(None, (name, other)):
        require_reachable(find_target(named))  # what needs a few JSON files only is found before PyTorch is imported
    with starting(settings["debug"]) as progress:
        from folora_q.evaluation.harness import HarnessRequest
        from folora_q.workflows.evaluate import EvaluationRequest, run_evaluation
    harness = None
    if tasks:
        harness = HarnessRequest(_names(tasks), tasks_folder, limit, num_fewshot, as_chat)
    request = EvaluationRequest(
        name=name,
        other=other,
        against=against,
        recipe=recipe,
        general_text=text,
        samples=samples,
        bits=bits,
        dtype=dtype,
        allow_code=allow_code,
        harness=harness,
        keep=measured,
        limits=None if limits is None else limits.section,
        trust=trust,
    )
    outcome = run_evaluation(request, progress)
    _print_outcome(outcome)
    if other is not None:
        _print_alone(outcome.evaluation, (name, other))
    if output is not None:
        _write(outcome, output)
        line = f"folora-q report {shlex.quote(str(output))}"
        out.print(f"\n[bold]Next[/]\n  [dim]# these results as one page[/]\n  [cyan]{escape(line)}[/]", soft_wrap=True)
    if limits is not None and (failures := limits.failures(outcome.evaluation.kept)):
        raise RunError(f"not kept, by {fail_under}: {listed(failures)}")


def _names(text: str) -> list[str]:
    return [name.strip() for name in text.split(",") if name.strip()]


def _print_outcome(outcome: EvaluationResult) -> None:
    found = outcome.evaluation
    print_evaluation(found, f"{found.tuned} against {found.base}")
    if found.harness:
        print_harness(found.harness)
    _print_layers(found)
    for answer in [a for a in outcome.answers if a.kind == "task"][:1] + [
        a for a in outcome.answers if a.kind == "general"
    ][:1]:
        print_answer(answer)


def _print_alone(found: Evaluation, names: Sequence[str]) -> None:
    """Print what each adapter alone had on its own task, as its run measured it."""
    folders = [Path(name).resolve() for name in names]
    runs = [next((at for at in (path, path.parent) if RunFolder(at).evaluation.is_file()), None) for path in folders]
    measured = [run for run in runs if run is not None]
    for run, together in zip(measured, found.of_kind(TextKind.EARLIER), strict=False):
        alone = read_evaluation(RunFolder(run).evaluation)
        if alone is None or len(measured) < len(names) or not (task := alone.of_kind(TextKind.TASK)):
            continue
        losses = f"{task[0].loss.tuned.value:.4f} alone, {together.loss.tuned.value:.4f} with the other added"
        out.print(f"{escape(visible(together.name))}: loss {losses}", soft_wrap=True)


def _print_layers(found: Evaluation) -> None:
    moved = sorted(found.layers, key=lambda layer: -layer.drift.get(TextKind.GENERATED, 0.0))[:MAX_MOVED_LAYERS]
    if moved:
        named = ", ".join(
            f"{escape(visible(layer.name))} ({layer.drift.get(TextKind.GENERATED, 0.0):.2g})" for layer in moved
        )
        out.print(f"moved most on model-generated text, E‖ΔWx‖²/E‖Wx‖²: {named}", soft_wrap=True)


def _write(outcome: EvaluationResult, output: Path) -> None:
    output.mkdir(parents=True)
    folder = RunFolder(output)
    folder.evaluation.write_text(to_json(outcome.evaluation), encoding="utf-8")
    folder.write_lines(folder.answers, answer_lines(outcome.answers))
    stages = [vars(stage) for stage in outcome.stages]
    folder.write_manifest({"status": "evaluation", "stages": stages})
