"""Evaluate a target: find it, load it, gather text, measure. Prints nothing."""

from __future__ import annotations

from collections.abc import Sequence
from contextlib import suppress
from dataclasses import dataclass, field, replace
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Literal

from folora_q.calibration.gate_store import load_gates
from folora_q.calibration.sample import ProxySample
from folora_q.calibration.sample_cache import SampledModel, load_or_sample, read_samples
from folora_q.data.kept_prompts import kept_sources
from folora_q.data.rendering import Renderer
from folora_q.data.task_data import TaskTokens, chat_template, read_task, tokenize_task
from folora_q.errors import UserError, first_line
from folora_q.evaluation.drift import predicted_drift
from folora_q.evaluation.evaluate import HeldOut, HeldOutSources, evaluate, evaluate_layers, held_out
from folora_q.evaluation.harness import HarnessRequest, run_harness
from folora_q.evaluation.kept import Kept
from folora_q.evaluation.model_pair import ModelPair
from folora_q.evaluation.task import make_scorer
from folora_q.memory.positions import longest_input
from folora_q.models.hardware import PeakMemory
from folora_q.models.load import stop_at
from folora_q.models.parts import embedding_rows
from folora_q.models.trust import NOTHING, Trust
from folora_q.progress import Progress, Stage, StageTimer
from folora_q.recipe.evaluation import EvaluationSection
from folora_q.recipe.keep import KeepSection
from folora_q.recipe.schema import ModelSection, ProxySection, Recipe
from folora_q.runs.earlier_tasks import unknown_tasks
from folora_q.runs.result_files import read_evaluation
from folora_q.runs.results import AnswerResult, Evaluation, HarnessResult, LayerResult
from folora_q.targets.find import Target, find_target
from folora_q.targets.load import LoadedTarget, Precision, fetched, load_target
from folora_q.workflows.earlier_tasks import (
    EarlierTask,
    TaskReading,
    held_out_texts,
    read_earlier_tasks,
    read_tasks,
    score_earlier,
)
from folora_q.workflows.keeping import BaseAnswers
from folora_q.workflows.together import add_adapters

# Length of texts that are sampled for an evaluation only.
SAMPLE_TOKENS = 128


@dataclass(frozen=True)
class EvaluationRequest:
    """What to evaluate, and how.

    Attributes:
        name: a run, an adapter, or a merged model.
        other: a run or an adapter whose change is added to that of `name`; the tasks of both are measured.
        against: the base to compare with; None is the one recorded in `name`.
        recipe: task, metric and settings; None is the run's own.
        general_text: text files instead of the recipe's.
        samples: number of texts to sample from the base, if there is no run with samples.
        bits: weight precision; None is 4 for an adapter, as it was trained, and 16 for a model, as it will be used.
        keep: names of capabilities and files to measure; None are the recipe's.
        limits: those that must be measured besides.
        trust: what the models may do.
    """

    name: str
    other: str | None = None
    against: str | None = None
    recipe: Recipe | None = None
    general_text: Sequence[Path] = ()
    samples: int = 64
    bits: Literal[4, 16] | None = None
    dtype: str = "auto"
    allow_code: bool = False
    harness: HarnessRequest | None = None
    keep: KeepSection | None = None
    limits: KeepSection | None = None
    trust: Trust = NOTHING


@dataclass(frozen=True)
class EvaluationResult:
    """What was measured, and how long it took."""

    evaluation: Evaluation
    answers: list[AnswerResult]
    stages: list[Stage] = field(default_factory=list)


def run_evaluation(request: EvaluationRequest, progress: Progress) -> EvaluationResult:
    """Measure a tuned model against its base.

    Raises:
        UserError: the target is not found, has no base to compare with, or a text cannot be read.
        RunError: the model could not be loaded or sampled from.
    """
    clock = StageTimer(progress)
    if request.other is None:
        return _evaluate(request, find_target(request.name), [], clock)
    with TemporaryDirectory(prefix="folora-q-") as scratch:
        both = add_adapters(request.name, request.other, Path(scratch), request.trust)
        return _evaluate(request, both.target, both.tasks, clock)


def _evaluate(
    request: EvaluationRequest, target: Target, tasks: Sequence[tuple[str, Recipe]], clock: StageTimer
) -> EvaluationResult:
    """Measure a target on its own task, if it is a run's, and on others that are named."""
    recipe = request.recipe or recipe_of(target)
    section = recipe.evaluation if recipe else EvaluationSection()
    if request.general_text:
        section = section.model_copy(update={"general_text": [str(path) for path in request.general_text]})
    scorer = make_scorer(section, request.allow_code)
    against = ModelSection(model_name_or_path=request.against) if request.against else None
    with clock.stage(f"loading {target.name}", None):
        target = fetched(target)
        precision = Precision(request.dtype, request.bits or (4 if target.adapter else 16))
        loaded = load_target(target, precision, against, compare=True, trust=request.trust)
    clock.meter = PeakMemory(loaded.hardware.device)
    clock.note(f"{target.kind}, {loaded.held}")
    if loaded.hardware.others is not None:
        clock.note(loaded.hardware.others)
    use_template_of(request.recipe, loaded)
    model_pair = ModelPair(loaded.model, loaded.base)
    data = task_of(request, recipe, loaded, model_pair, clock)
    kept = _kept(request, recipe, loaded, model_pair, clock)
    training = None if recipe is None else recipe.training
    sources = HeldOutSources(*generated_text(request, loaded, model_pair, clock), data, kept, training)
    length = {"max_length": recipe.training.max_length} if recipe else {}
    on = held_out(loaded.tokenizer, section, model_pair.device, sources, **length)
    how = TaskReading(loaded.target.section, clock, request.allow_code, request.trust, required=False)
    earlier = [*read_tasks(tasks, how), *([] if recipe is None else _earlier(request, recipe, clock))]
    on = replace(on, texts=[*on.texts, *held_out_texts(earlier, section.batch_size, model_pair.device)])
    found = evaluate(model_pair, on, section, scorer, clock)
    evaluation = Evaluation(
        tuned=target.name,
        base=(against or target.base or target.section).model_name_or_path,
        held=loaded.held,
        texts=found.texts,
        preference=found.preference,
        score=found.score,
        layers=_layers(request, loaded, model_pair, on, clock),
        harness=_harness(request.harness, loaded, model_pair, section, clock),
        kept=found.kept,
        earlier=score_earlier(model_pair, earlier, clock),
    )
    return EvaluationResult(evaluation, found.answers, list(clock.stages.values()))


def recipe_of(target: Target) -> Recipe | None:
    """Return the recipe of the run that a target belongs to, if any."""
    if target.run is None or not target.run.recipe.is_file():
        return None
    try:
        return target.run.read_recipe()
    except (OSError, ValueError) as error:
        raise UserError(f"{target.run.recipe} cannot be read: {first_line(error)}", "give --recipe") from None


def use_template_of(recipe: Recipe | None, loaded: LoadedTarget) -> None:
    """Render chats with the template of a recipe that the user named, if it has one; a run's adapter has its own."""
    if recipe is not None and (template := chat_template(recipe)) is not None:
        loaded.tokenizer.chat_template = template


def samples_of_run(loaded: LoadedTarget) -> tuple[list[ProxySample], Recipe] | None:
    """Return the text that a run sampled, with its recipe, which says what each sample was for; None without either."""
    run = loaded.target.run
    if run is None or not run.recipe.is_file():
        return None
    with suppress(OSError, ValueError):
        recipe = run.read_recipe()
        if samples := read_samples(run.proxy, embedding_rows(loaded.model)):
            return samples, recipe
    return None


def task_of(
    request: EvaluationRequest, recipe: Recipe | None, loaded: LoadedTarget, model_pair: ModelPair, clock: StageTimer
) -> TaskTokens | None:
    """Read and tokenize the task's rows. If a run's data is gone, only the rest is measured."""
    if recipe is None:
        clock.note("there is no recipe for the task (--recipe), so only forgetting is measured")
        return None
    try:
        task = read_task(recipe, clock)
        data = tokenize_task(recipe, task, loaded.tokenizer, clock)
    except UserError as error:
        if request.recipe is not None:
            raise
        clock.note(f"the task is not measured: {error.message}")
        return None
    for model in filter(None, (model_pair.model, model_pair.other)):
        for token in data.ends_of_turn:
            stop_at(model, token)
    return data


def _earlier(request: EvaluationRequest, recipe: Recipe, clock: StageTimer) -> list[EarlierTask]:
    """Read the tasks that a run's model learned before; those whose data is gone are left out."""
    for reason in unknown_tasks(recipe.model):
        clock.note(reason)
    return read_earlier_tasks(recipe.model, clock, request.allow_code, request.trust, required=False)


def generated_text(
    request: EvaluationRequest, loaded: LoadedTarget, model_pair: ModelPair, clock: StageTimer, least: int = 1
) -> tuple[list[list[int]], int]:
    """Return model-generated text of the base (the run's held-out samples, or new ones), and the seed that crops it.

    Args:
        least: the number of samples below which new ones are generated.
    """
    run = loaded.target.run
    of_base = run is not None and (loaded.target.section.adapter is not None or not run.earlier.is_dir())
    if request.against is None and of_base and (sampled := samples_of_run(loaded)) is not None:
        samples, recipe = sampled
        kept = samples[recipe.proxy.num_samples + recipe.steering_texts :]
        if len(kept) >= least:
            return [sample.ids for sample in kept], recipe.proxy.seed
    section = ProxySection(
        source="bos" if loaded.tokenizer.chat_template is None else "mixed",
        num_samples=request.samples,
        num_heldout_samples=1,
        max_new_tokens=SAMPLE_TOKENS,
    )
    with model_pair.base() as model:
        base = SampledModel(model, loaded.tokenizer, loaded.fingerprint, loaded.hardware.dtype)
        samples = load_or_sample(base, section, clock)
    return [sample.ids for sample in samples[: request.samples]], section.seed


def _kept(
    request: EvaluationRequest, recipe: Recipe | None, loaded: LoadedTarget, model_pair: ModelPair, clock: StageTimer
) -> list[Kept]:
    """Return what is kept, as the base answers it; only its held-out half is measured."""
    section = recipe.keep if recipe else KeepSection()
    if request.keep is not None:
        section = section.model_copy(update={"capabilities": [], "files": []}).joined(request.keep)
    if request.limits is not None:
        section = section.joined(request.limits)
    limit = longest_input(loaded.model.config.to_dict())
    found = kept_sources(section, Renderer(loaded.tokenizer), clock.note, limit)
    sources = [source.to_measure for source in found]
    size = (recipe.evaluation if recipe else EvaluationSection()).batch_size
    with model_pair.base() as model:
        base = SampledModel(model, loaded.tokenizer, loaded.fingerprint, loaded.hardware.dtype)
        return BaseAnswers(base, size, clock).kept(sources) if sources else []


def _layers(
    request: EvaluationRequest, loaded: LoadedTarget, model_pair: ModelPair, on: HeldOut, clock: StageTimer
) -> list[LayerResult]:
    """Measure drift by layer; for a run's adapter also the predicted drift and the energy kept."""
    run = loaded.target.run
    own = run is not None and loaded.target.adapter == run.trained and request.against is None
    if run is None or model_pair.adapted is None or not own or not run.gates.is_file():
        return evaluate_layers(model_pair, on, clock)
    predicted = predicted_drift(model_pair.adapted, load_gates(run.gates, model_pair.device))
    earlier = read_evaluation(run.evaluation)
    kept = {} if earlier is None else {layer.name: layer.energy_kept for layer in earlier.layers}
    return evaluate_layers(model_pair, on, clock, predicted, kept)


def _harness(
    wanted: HarnessRequest | None,
    loaded: LoadedTarget,
    model_pair: ModelPair,
    section: EvaluationSection,
    clock: StageTimer,
) -> list[HarnessResult]:
    if wanted is None:
        return []
    with clock.stage("lm-eval-harness, base and tuned", 2 * len(set(wanted.tasks)), "runs") as done:
        wanted = replace(wanted, batch_size=section.batch_size)
        return run_harness(model_pair, loaded.tokenizer, wanted, done)
