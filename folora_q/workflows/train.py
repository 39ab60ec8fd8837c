"""One run in reading order: load, sample, statistics, train, evaluate, save. Prints nothing; tells `Progress`."""

from __future__ import annotations

import math
import random
import shlex
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from peft import PeftModel
from transformers import PreTrainedTokenizerBase as Tokenizer

from folora_q.calibration.collect import build_gates, row_penalties
from folora_q.calibration.gate_store import gate_results, load_gates, save_gates
from folora_q.calibration.sample import ProxySample
from folora_q.calibration.sample_cache import load_or_sample, read_samples, write_samples
from folora_q.calibration.texts import penalty_text, public_windows
from folora_q.core import SpectralGate
from folora_q.data.advice import size_warnings
from folora_q.data.batch_splitting import first_rows
from folora_q.data.formats import Example, Text
from folora_q.data.sources import find
from folora_q.data.task_data import TaskTokens, chat_template, read_task, tokenize_task
from folora_q.data.thoughts import Said
from folora_q.data.tokenized import Tokenized
from folora_q.data.tokens import batches
from folora_q.data.windows import crops
from folora_q.distributed import require_one_process
from folora_q.errors import FoloraError, RunFailed, first_line
from folora_q.evaluation.divergence import HeldOutText
from folora_q.evaluation.drift import predicted_drift
from folora_q.evaluation.evaluate import HeldOut, evaluate, evaluate_layers, held_out
from folora_q.evaluation.model_pair import ModelPair
from folora_q.evaluation.task import Scorer, make_scorer
from folora_q.export.card import CARD, write_card
from folora_q.models.adapters import (
    AdapterPair,
    adapter_pairs,
    attach_adapter,
    save_adapter,
)
from folora_q.models.hardware import Hardware, PeakMemory, choose_hardware
from folora_q.models.load import LoadedModel, load_model, require_loadable, require_packable, stop_at
from folora_q.models.logits import verify_chunked_logits
from folora_q.models.target_modules import in_16_bits, listed, without_adapter
from folora_q.models.tokenizer import load_tokenizer
from folora_q.models.trust import NOTHING, Trust
from folora_q.preflight.ids import require_rows
from folora_q.progress import Progress, Stage, StageTimer
from folora_q.recipe.schema import EvaluationSection, Recipe, TrainingSection
from folora_q.recipe.strict_yaml import dump_yaml
from folora_q.rules import rule_of
from folora_q.runs.folder import RunFolder, check_run_folder, open_run_folder
from folora_q.runs.lock import locked
from folora_q.runs.manifest import new_manifest
from folora_q.runs.results import AnswerResult, Evaluation, LayerResult, answer_lines, to_json
from folora_q.storage.files import atomic_write, commit_directory
from folora_q.storage.redaction import conceal
from folora_q.training.callbacks import Reporting, SavedAtTheEnd, Stopping
from folora_q.training.checkpoints import discard_after, step_of
from folora_q.training.packing import check_packing
from folora_q.training.resume import Resumption, prepare_resume, read_earlier
from folora_q.training.schedule import warmup_of
from folora_q.training.trainer import GatedTrainer, build_trainer


@dataclass(frozen=True)
class RunResult:
    """What a run learned, forgot and cost, and why its numbers may say little."""

    folder: Path
    evaluation: Evaluation
    answers: list[AnswerResult]
    stages: list[Stage]
    warnings: list[str]


def run_training(
    recipe: Recipe,
    progress: Progress,
    overwrite: bool = False,
    allow_code: bool = False,
    resume: bool = False,
    force: bool = False,
    trust: Trust = NOTHING,
) -> RunResult:
    """Do everything that a recipe says.

    Args:
        overwrite: replace an earlier run in `training.output_dir`.
        allow_code: run the Python that `evaluation.metric_function` names.
        resume: go on with the run there, from its newest checkpoint that is whole; begin where there is none.
        force: go on although the recipe, its data, the model or a library is not as it was.
        trust: what the model may do.

    Raises:
        UserError: the recipe, the data or the folder is wrong; found before the model is loaded where that is possible.
            Or this is one of several processes; found before anything is written.
        RunFailed: the run could not go on. Where its evaluation failed, the adapter that was trained is kept.
    """
    require_one_process()
    clock = StageTimer(progress)
    target = Path(recipe.training.output_dir)
    with locked(target, clock.note):
        earlier = read_earlier(RunFolder(target)) if resume else None
        if earlier is None:
            check_run_folder(target, overwrite)
        if resume and earlier is None:
            clock.note(f"there is no run in {target} to go on with: it begins")
        return _run_here(recipe, target, earlier, clock, overwrite, allow_code, force, trust)


def _run_here(
    recipe: Recipe,
    target: Path,
    earlier: dict[str, Any] | None,
    clock: StageTimer,
    overwrite: bool,
    allow_code: bool,
    force: bool,
    trust: Trust,
) -> RunResult:
    """Read the data, open the folder, and mark there how the run ends."""
    scorer = make_scorer(recipe.evaluation, allow_code)
    if recipe.training.packing:
        require_packable(recipe.model, trust)
    task = read_task(recipe, clock)
    _try(scorer, task.heldout)
    config = require_loadable(recipe.model, trust)
    tokenizer = load_tokenizer(recipe.model, chat_template(recipe), trust)
    data = tokenize_task(recipe, task, tokenizer, clock)
    require_rows(data, tokenizer, config)
    sources = [*recipe.data.train_dataset, *(recipe.data.eval_dataset or [])]
    warnings = size_warnings(recipe, data)
    for warning in warnings:
        clock.note(f"warning: {warning}")
    manifest = new_manifest(recipe, {name: path for source in sources for name, path in find(source).files().items()})
    hardware = choose_hardware(recipe.model.dtype)
    manifest |= {
        "data": data.summary(),
        "warnings": warnings,
        "hardware": hardware.reason,
        "computing": hardware.facts(),
    }
    if trust != NOTHING:
        manifest["allowed"] = trust.flags()
    resumed = None
    if earlier is None:
        folder = open_run_folder(target, overwrite)
    else:
        folder = RunFolder(target)
        resumed = prepare_resume(folder, earlier, recipe, manifest, force, clock.note)
        manifest = resumed.manifest(manifest)
    folder.write_manifest(manifest)
    try:
        if skipped := data.skipped():
            folder.write_lines(folder.skipped, skipped)
        atomic_write(folder.recipe, dump_yaml(recipe.model_dump(mode="json")))
        result = _run(recipe, folder, data, hardware, tokenizer, scorer, manifest, clock, resumed, trust)
    except BaseException as error:
        interrupted = not isinstance(error, Exception)  # or whoever read our output has gone
        manifest |= {"status": "interrupted" if interrupted else "failed", "error": conceal(str(error))}
        manifest["stages"] = clock.to_list()
        folder.write_manifest(manifest)
        if isinstance(error, KeyboardInterrupt):
            raise type(error)(f"what had been written is in {target}, marked as interrupted") from None
        raise
    return result


def _run(
    recipe: Recipe,
    folder: RunFolder,
    data: TaskTokens,
    hardware: Hardware,
    tokenizer: Tokenizer,
    scorer: Scorer | None,
    manifest: dict[str, Any],
    clock: StageTimer,
    resumed: Resumption | None,
    trust: Trust,
) -> RunResult:
    clock.meter = PeakMemory(hardware.device)
    clock.note(f"computing in {hardware}")
    if hardware.others is not None:
        clock.note(hardware.others)

    with clock.stage("loading the model in 4 bits", None):
        base = load_model(recipe.model, hardware, tokenizer, trust)
    for token in data.ends_of_turn:
        stop_at(base.model, token)
    first = torch.tensor([data.train.sequences[0]["input_ids"][:16]], device=base.model.device)
    verify_chunked_logits(base.model, first)  # statistics, KL and losses all rest on it
    clock.note(f"{base.quantized_modules} linear layers in 4 bits ({base.quantization})")
    clock.note(f"in 16 bits: {listed(in_16_bits(base.model))} of the weights")
    if resumed is not None:
        manifest["files_sha256"] = resumed.require_model(base.fingerprint)
    manifest["model"] = {"name": base.name, "revision": base.revision, "fingerprint": base.fingerprint}

    proxy, proxy_heldout = _proxy_text(recipe, base, hardware, folder, clock, resumed)
    folder.remember(manifest, folder.proxy)
    measured_on = held_out(
        tokenizer,
        recipe.evaluation,
        base.model.device,
        own=[sample.ids for sample in proxy_heldout],
        own_seed=recipe.proxy.seed,
        data=data,
        max_length=recipe.training.max_length,
    )

    model = attach_adapter(base, recipe.adapter, recipe.training.seed)
    clock.note(f"adapters on {len(adapter_pairs(model))} linear layers{_left_out(model)}")
    if recipe.training.packing:
        rows = data.train.sequences
        check_packing(model, rows[0]["input_ids"], rows[len(rows) - 1]["input_ids"])
    trainer = build_trainer(
        model, tokenizer, data.train.sequences, data.heldout.sequences, recipe, hardware, folder.path, tell=clock.note
    )
    trainer.own_text = _monitoring_text(recipe, base, proxy_heldout)
    trainer.real_text = _few_windows(recipe, measured_on)
    if recipe.training.packing:
        clock.note(f"packed into {len(trainer.train_dataset):,} sequences")
    for advice in recipe.advice:
        clock.note(advice)
    if recipe.gate.enabled:
        _gate(recipe, base, model, trainer, data.train, proxy, proxy_heldout, folder, clock, resumed)
        folder.remember(manifest, folder.gates)

    _train(recipe.training, trainer, folder, clock, resumed.checkpoint if resumed is not None else None)

    _save(recipe, base, model, folder)  # before the evaluation, which can fail and must not cost what was trained

    model_pair = ModelPair(model)
    try:
        texts, score, answers = evaluate(model_pair, measured_on, recipe.evaluation, scorer, clock)
        layers = _layers(model_pair, trainer, measured_on, clock)
    except Exception as error:
        raise _evaluation_failed(error, folder, recipe.evaluation, trust) from error
    held = f"4 bits ({base.quantization}), computing in {hardware}"
    evaluation = Evaluation(folder.path.name, base.name, held, texts, score, layers)
    atomic_write(folder.evaluation, to_json(evaluation))
    folder.write_lines(folder.answers, answer_lines(answers))
    write_card(folder.adapter / CARD, recipe, base, evaluation)
    manifest |= {"status": "complete", "stages": clock.to_list()}
    folder.write_manifest(manifest)
    if not trainer.saves:
        discard_after(folder.path, 0)  # the one at the end of training, or those of a signal
    return RunResult(folder.path, evaluation, answers, list(clock.stages.values()), manifest["warnings"])


def _left_out(model: PeftModel) -> str:
    parts = without_adapter(model)
    return f"; none on {listed(parts)} of the weights" if parts else ""


def _proxy_text(
    recipe: Recipe,
    base: LoadedModel,
    hardware: Hardware,
    folder: RunFolder,
    clock: StageTimer,
    resumed: Resumption | None,
) -> tuple[list[ProxySample], list[ProxySample]]:
    """Sampled text from the run that goes on, from the cache or from the model, and its held-out tail."""
    section = recipe.proxy
    samples = None
    if resumed is not None and resumed.keeps(folder.proxy):
        samples = read_samples(folder.proxy, base.model.get_input_embeddings().weight.shape[0])
    if samples is None:
        samples = load_or_sample(base.model, base.tokenizer, base.fingerprint, str(hardware.dtype), section, clock)
        write_samples(folder.proxy, samples, base.tokenizer)
    return samples[: section.num_samples], samples[section.num_samples :]


def _monitoring_text(recipe: Recipe, base: LoadedModel, proxy: Sequence[ProxySample]) -> HeldOutText:
    """Some of the held-out samples, from their start and cut, for the KL during training."""
    ids = [sample.ids for sample in proxy[: recipe.evaluation.num_proxy_samples]]
    both = [*ids, *crops(ids, recipe.proxy.seed)]
    return HeldOutText("own text", "own", list(batches(both, recipe.evaluation.batch_size, base.model.device)))


def _few_windows(recipe: Recipe, on: HeldOut) -> list[HeldOutText]:
    """The first windows of each general text, the same number of each, for the rise of its loss during training."""
    texts = [text for text in on.texts if text.kind == "general"]
    count = math.ceil(recipe.evaluation.num_proxy_samples / max(len(texts), 1))
    return [replace(text, batches=first_rows(text.batches, count)) for text in texts]


def _gate(
    recipe: Recipe,
    base: LoadedModel,
    model: PeftModel,
    trainer: GatedTrainer,
    task: Tokenized,
    proxy: Sequence[ProxySample],
    heldout: Sequence[ProxySample],
    folder: RunFolder,
    clock: StageTimer,
    resumed: Resumption | None,
) -> None:
    """The gates, from statistics of both texts or from the run that goes on, and A's gated start."""
    pairs = adapter_pairs(model)
    if resumed is not None and resumed.keeps(folder.gates):
        gates = load_gates(folder.gates, base.model.device)
    else:
        gates = _measured_gates(recipe, base, model, pairs, task, proxy, clock)
        save_gates(folder.gates, gates)
        if resumed is not None:
            resumed.require_gates(folder.gates)
    clock.note(f"{len({id(g) for g in gates.values()})} gates for {len(gates)} adapted layers")
    rule_of(recipe.gate).initialize(pairs, gates, recipe.gate)  # a checkpoint then brings its own A
    penalties = _penalties(recipe, model, pairs, gates, (proxy[: len(heldout)], heldout), clock)
    atomic_write(folder.gate_results, to_json(gate_results(gates, penalties)))
    trainer.gate_with(gates)


def _penalties(
    recipe: Recipe,
    model: PeftModel,
    pairs: Sequence[AdapterPair],
    gates: Mapping[str, SpectralGate],
    samples: tuple[Sequence[ProxySample], Sequence[ProxySample]],
    clock: StageTimer,
) -> dict[str, tuple[float, float]]:
    """What A's rows cost on texts that the gates were made of, and on as many that they were not."""
    size, device = recipe.statistics_batch_size, model.device
    seen, unseen = (list(batches([sample.ids for sample in of], size, device)) for of in samples)
    recompute = recipe.training.recomputes_on(device.type == "cuda")
    penalties = row_penalties(model, pairs, gates, (seen, unseen), recipe.gate, clock, recompute)
    inside, outside = (sum(both[of] for both in penalties.values()) for of in (0, 1))
    if outside > 0 and inside > 0:
        ratio = f"{outside / inside:.2g}"
        clock.note(f"penalty of A's directions on held-out model-generated text: {ratio} times the in-sample penalty")
    return penalties


def _measured_gates(
    recipe: Recipe,
    base: LoadedModel,
    model: PeftModel,
    pairs: Sequence[AdapterPair],
    task: Tokenized,
    proxy: Sequence[ProxySample],
    clock: StageTimer,
) -> dict[str, SpectralGate]:
    size, device = recipe.statistics_batch_size, base.model.device
    rows = len(task.sequences)
    chosen = random.Random(recipe.training.seed).sample(range(rows), min(recipe.gate.num_task_samples, rows))
    sampled = task.sequences[chosen]
    task_text = list(batches(sampled["input_ids"], size, device, sampled["labels"]))
    # Another seed than the held-out crops': the same offsets would be no error, but need not be.
    whole = [sample.ids for sample in proxy]
    proxy_text = penalty_text(
        written=list(batches([*whole, *crops(whole, recipe.proxy.seed + 1)], size, device)),
        public=list(batches(public_windows(base.tokenizer), size, device)),
        share=recipe.proxy.public_share,
    )
    recompute = recipe.training.recomputes_on(device.type == "cuda")
    return build_gates(
        model, pairs, proxy_text, task_text, recipe.gate, clock, recipe.proxy.statistics_memory, recompute
    )


def _train(
    training: TrainingSection, trainer: GatedTrainer, folder: RunFolder, clock: StageTimer, checkpoint: Path | None
) -> None:
    steps = training.steps_for(len(trainer.train_dataset))
    if (warmup := warmup_of(training.warmup_steps, steps)) < int(training.warmup_steps):
        clock.note(f"training.warmup_steps: {warmup} of {steps} steps, at most a third, not {training.warmup_steps:g}")

    def record(line: dict[str, Any]) -> None:
        folder.append_metrics({"stage": "training", **line})

    trainer.skipped.record = record
    stopping = Stopping(clock.note)
    with clock.stage("training", steps) as done:
        if checkpoint is not None:
            done(step_of(checkpoint))
        for callback in (Reporting(done, record), SavedAtTheEnd(), stopping):
            trainer.add_callback(callback)
        with stopping.listening():
            trainer.train(checkpoint)
    trainer.conclude(steps, clock.note)
    trainer.require_learned()


def _layers(model_pair: ModelPair, trainer: GatedTrainer, on: HeldOut, clock: StageTimer) -> list[LayerResult]:
    pairs = adapter_pairs(trainer.model)
    predicted = predicted_drift(pairs, trainer.gates) if trainer.gates is not None else None
    return evaluate_layers(model_pair, on, clock, predicted, trainer.energy_kept())


def _try(scorer: Scorer | None, heldout: Sequence[Example]) -> None:
    """Score one reference against itself: a function that fails on it is found before anything is trained."""
    questions = (example for example in heldout if not isinstance(example, Text))
    if scorer is not None and (first := next(questions, None)) is not None and first.reference is not None:
        said = Said(first.reference)
        scorer(said, said)


def _evaluation_failed(error: Exception, folder: RunFolder, section: EvaluationSection, trust: Trust) -> RunFailed:
    """What to raise where the evaluation failed: what is kept, and how it is repeated without training again."""
    reason = error.message if isinstance(error, FoloraError) else f"{type(error).__name__}: {first_line(error)}"
    options = [*["--allow-code"] * (section.metric == "function"), *trust.flags()]
    line = shlex.join(["folora-q", "eval", str(folder.path), *options])
    helps = f"{error.hint}; " if isinstance(error, FoloraError) and error.hint else ""
    return RunFailed(
        f"the evaluation failed: {reason}; the adapter that was trained is in {folder.adapter}",
        f"{helps}`{line}` repeats the evaluation alone; `folora-q train` with --resume repeats it and ends the run",
    )


def _save(recipe: Recipe, base: LoadedModel, model: PeftModel, folder: RunFolder) -> None:
    """The adapter, with a card that has no numbers yet."""
    with commit_directory(folder.adapter) as staging:
        save_adapter(model, base, recipe.export, staging)
        base.tokenizer.save_pretrained(staging)
        base.model.generation_config.save_pretrained(staging)
        write_card(staging / CARD, recipe, base, None)
