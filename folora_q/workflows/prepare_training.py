"""Prepare a run before its model is loaded: read and tokenize the data, choose the hardware, open the run folder."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from transformers import PreTrainedTokenizerBase as Tokenizer

from folora_q.data.advice import size_warnings
from folora_q.data.examples import Example, with_answers
from folora_q.data.kept_prompts import KeptSource, kept_sources
from folora_q.data.sources import find
from folora_q.data.task_data import TaskTokens, chat_template, read_task, tokenize_task
from folora_q.data.thoughts import Said
from folora_q.distributed.processes import Processes
from folora_q.evaluation.task import Scorer, make_scorer
from folora_q.memory.micro_batches import divided_among
from folora_q.memory.positions import longest_input
from folora_q.models.hardware import Hardware, choose_hardware
from folora_q.models.load import require_loadable, require_packable
from folora_q.models.tokenizer import load_tokenizer
from folora_q.models.trust import NOTHING, Trust
from folora_q.preflight.ids import require_rows
from folora_q.progress import StageTimer
from folora_q.recipe.schema import Recipe
from folora_q.runs.earlier_tasks import unknown_tasks
from folora_q.runs.folder import RunFolder, open_run_folder
from folora_q.runs.manifest import new_manifest
from folora_q.training.resume import Manifests, Resumption, prepare_resume
from folora_q.workflows.earlier_tasks import EarlierTask, read_earlier_tasks


@dataclass(frozen=True, kw_only=True)
class TrainingRequest:
    """A run to start or resume.

    Attributes:
        overwrite: replace an earlier run in `training.output_dir`.
        resume: resume the run there from its newest complete checkpoint.
        force: resume although the recipe, its data, the model or a library has changed.
        allow_code: run the Python that `evaluation.metric_function` names.
        trust: what the model may do.
    """

    recipe: Recipe
    overwrite: bool = False
    resume: bool = False
    force: bool = False
    allow_code: bool = False
    trust: Trust = NOTHING


@dataclass(frozen=True)
class Place:
    """Where a process runs.

    Attributes:
        scratch: a temporary folder, in which others than the first process keep what they would write; None in the
            first.
    """

    processes: Processes
    scratch: Path | None = None


@dataclass(frozen=True)
class PreparedRun:
    """Everything that is prepared before the model is loaded.

    Attributes:
        scorer: scores answers; None where the recipe has no metric.
        kept: what the recipe keeps, as far as this model can.
        manifest: content of run.json, updated as the run proceeds.
        resumed: the run that is resumed, if any.
        earlier: the tasks that were learned before, with `model.adapter`.
        processes: compute the run together; `folder` is the run folder in the first, and a temporary one in others.
    """

    request: TrainingRequest
    recipe: Recipe
    folder: RunFolder
    data: TaskTokens
    tokenizer: Tokenizer
    scorer: Scorer | None
    kept: list[KeptSource]
    hardware: Hardware
    manifest: dict[str, Any]
    resumed: Resumption | None
    earlier: list[EarlierTask]
    processes: Processes


def prepare(request: TrainingRequest, earlier: dict[str, Any] | None, timer: StageTimer, place: Place) -> PreparedRun:
    """Read and tokenize the data, choose the hardware, and open the folder.

    Args:
        earlier: run.json of the run to resume.
    """
    recipe, processes = request.recipe, place.processes
    shared = divided_among(recipe, processes.count)
    scorer = make_scorer(recipe.evaluation, request.allow_code)
    if recipe.training.packing:
        require_packable(recipe.model, request.trust)
    data, tokenizer, kept, earlier_tasks = processes.after_the_first(lambda: _read(request, scorer, timer))
    warnings = [*size_warnings(recipe, data), *unknown_tasks(recipe.model)]
    for warning in warnings:
        timer.warn(warning)
    hardware = choose_hardware(recipe.model.dtype)
    files = _data_files(recipe)
    for task in earlier_tasks:
        files |= {f"{task.name}: {name}": path for name, path in _data_files(task.recipe).items()}
    manifest = new_manifest(recipe, files) | {
        "data": data.summary(),
        "warnings": warnings,
        "hardware": hardware.reason,
        "computing": {**hardware.facts(), "processes": processes.count},
    }
    if request.trust != NOTHING:
        manifest["allowed"] = request.trust.flags()
    target = Path(recipe.training.output_dir)

    def open_folder() -> Resumption | None:
        if earlier is None:
            open_run_folder(target, request.overwrite)
            return None
        manifests = Manifests(earlier, manifest)
        return prepare_resume(RunFolder(target), recipe, manifests, request.force, timer.note)

    resumed = processes.share(open_folder)
    if resumed is not None:
        manifest = resumed.manifest(manifest)
    folder = RunFolder(target if place.scratch is None else place.scratch)
    folder.write_manifest(manifest)
    return PreparedRun(
        request, shared, folder, data, tokenizer, scorer, kept, hardware, manifest, resumed, earlier_tasks, processes
    )


def _read(
    request: TrainingRequest, scorer: Scorer | None, timer: StageTimer
) -> tuple[TaskTokens, Tokenizer, list[KeptSource], list[EarlierTask]]:
    """Read and tokenize the data, what is kept, and the data of earlier tasks."""
    recipe = request.recipe
    task = read_task(recipe, timer)
    _try(scorer, task.heldout)
    with timer.stage("fetching the model's configuration and tokenizer", None):
        config = require_loadable(recipe.model, request.trust)
        tokenizer = load_tokenizer(recipe.model, chat_template(recipe), request.trust)
    data = tokenize_task(recipe, task, tokenizer, timer)
    require_rows(data, tokenizer, config)
    kept = kept_sources(recipe.keep, data.renderer, timer.note, longest_input(config.to_dict()))
    required = recipe.preserves_earlier_rows
    earlier = read_earlier_tasks(recipe.model, timer, request.allow_code, request.trust, required)
    return data, tokenizer, kept, earlier


def _data_files(recipe: Recipe) -> dict[str, Path]:
    sources = [*recipe.data.train_dataset, *(recipe.data.eval_dataset or [])]
    files = {name: path for source in sources for name, path in find(source).files().items()}
    return files | {path: Path(path) for path in recipe.keep.files}


def _try(scorer: Scorer | None, heldout: Sequence[Example]) -> None:
    """Score one reference against itself, so that a metric function that fails is found before training."""
    first = next(iter(with_answers(heldout)), None)
    if scorer is not None and first is not None and first.reference is not None:
        said = Said(first.reference)
        scorer(said, said)
