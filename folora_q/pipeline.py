"""One run in reading order: load, sample, statistics, train, evaluate, save. Prints nothing; tells `Progress`."""

from __future__ import annotations

import random
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from peft import PeftModel
from transformers import PreTrainedTokenizerBase as Tokenizer

from folora_q.data.prepare import TaskTokens, chat_template, read_task, tokenize_task
from folora_q.data.sources import source_files
from folora_q.data.tokenized import Tokenized
from folora_q.data.tokens import batches
from folora_q.evaluation.loss import GENERAL_TEXT, text_windows
from folora_q.evaluation.measure import Divergences, HeldOut, Measurements, compare, measure
from folora_q.evaluation.task import Answer
from folora_q.export.card import write_card
from folora_q.files import atomic_write
from folora_q.models.adapters import adapter_pairs, attach_adapter, save_adapter, start_gated
from folora_q.models.hardware import Hardware, choose_hardware
from folora_q.models.load import LoadedModel, load_model, require_packable, stop_at
from folora_q.models.tokenizer import load_tokenizer
from folora_q.progress import Clock, Progress
from folora_q.proxy.cache import cache_path, read_samples, write_samples
from folora_q.proxy.sample import ProxySample, sample_proxy
from folora_q.proxy.windows import crops, whole
from folora_q.recipe.schema import Recipe
from folora_q.recipe.strict_yaml import dump_yaml
from folora_q.runs.folder import RunFolder, check_run_folder, open_run_folder
from folora_q.runs.manifest import new_manifest
from folora_q.statistics.collect import build_gates, statistics_passes
from folora_q.statistics.store import save_gates
from folora_q.training.callbacks import Reporting
from folora_q.training.packing import check_packing
from folora_q.training.trainer import GatedTrainer, build_trainer

# The general text is read in windows of so many tokens, or fewer if training is shorter.
GENERAL_WINDOW = 256


@dataclass(frozen=True)
class RunResult:
    """What a run learned, forgot and cost."""

    folder: Path
    before: Measurements
    after: Measurements
    divergence: Divergences
    answers: list[tuple[Answer, Answer]]
    seconds: dict[str, float]

    @property
    def forgetting(self) -> float:
        """PEFT's measure: the rise of the loss on general text, in nats per token."""
        return self.after.general_loss - self.before.general_loss


def run_training(recipe: Recipe, progress: Progress, overwrite: bool = False) -> RunResult:
    """Do everything that a recipe says.

    Args:
        overwrite: replace an earlier run in `training.output_dir`.

    Raises:
        UserError: the recipe, the data or the folder is wrong; found before the model is loaded where that is possible.
        RunFailed: the run could not go on.
    """
    clock = Clock(progress)
    target = Path(recipe.training.output_dir)
    check_run_folder(target, overwrite)
    if recipe.training.packing:
        require_packable(recipe.model)
    task = read_task(recipe, clock)
    tokenizer = load_tokenizer(recipe.model, chat_template(recipe))
    data = tokenize_task(recipe, task, tokenizer, clock)
    sources = [*recipe.data.train_dataset, *(recipe.data.eval_dataset or [])]
    manifest = new_manifest(recipe, [file for source in sources for file in source_files(source)])
    manifest["data"] = data.summary()
    folder = open_run_folder(target, overwrite)
    folder.write_manifest(manifest)
    try:
        if skipped := data.skipped():
            folder.write_lines(folder.skipped, skipped)
        atomic_write(folder.recipe, dump_yaml(recipe.model_dump(mode="json")))
        result = _run(recipe, folder, data, tokenizer, manifest, clock)
    except BaseException as error:
        interrupted = isinstance(error, KeyboardInterrupt)
        manifest |= {"status": "interrupted" if interrupted else "failed", "error": str(error)}
        folder.write_manifest(manifest)
        if interrupted:
            raise KeyboardInterrupt(f"what had been written is in {target}, marked as interrupted") from None
        raise
    return result


def _run(
    recipe: Recipe,
    folder: RunFolder,
    data: TaskTokens,
    tokenizer: Tokenizer,
    manifest: dict[str, Any],
    clock: Clock,
) -> RunResult:
    hardware = choose_hardware(recipe.model.dtype)
    clock.note(f"computing in {str(hardware.dtype).removeprefix('torch.')} on {hardware.reason}")

    with clock.stage("loading the model in 4 bits", None):
        base = load_model(recipe.model, hardware, tokenizer)
    if data.end_of_turn is not None:
        stop_at(base, data.end_of_turn)
    clock.note(f"{base.quantized_modules} linear layers in 4 bits ({recipe.model.bnb_4bit_quant_type})")
    manifest |= {
        "hardware": hardware.reason,
        "model": {"name": base.name, "revision": base.revision, "fingerprint": base.fingerprint},
    }

    proxy, proxy_heldout = _proxy_text(recipe, base, hardware, folder, clock)

    model = attach_adapter(base, recipe.adapter, recipe.training.seed)
    if recipe.training.packing:
        rows = data.train.sequences
        check_packing(model, rows[0]["input_ids"], rows[len(rows) - 1]["input_ids"])
    trainer = build_trainer(
        model, tokenizer, data.train.sequences, data.heldout.sequences, recipe, hardware, folder.path
    )
    if recipe.training.packing:
        clock.note(f"packed into {len(trainer.train_dataset):,} sequences")
    measured_on = _held_out(recipe, base, data, proxy_heldout)

    before, answers_before = _measure(recipe, base, model, measured_on, clock, "measuring the base model")
    folder.append_metrics({"stage": "before", **asdict(before)})

    if recipe.gate.enabled:
        _gate(recipe, base, model, trainer, data.train, proxy, folder, clock)

    _train(trainer, folder, clock)

    after, answers_after = _measure(recipe, base, model, measured_on, clock, "measuring the tuned model")
    with clock.stage("comparing it with the base", len(measured_on.proxy_start) + len(measured_on.proxy_crops)) as done:
        divergence = compare(model, measured_on, done)
    folder.append_metrics({"stage": "after", **asdict(after), "divergence": asdict(divergence)})

    answers = list(zip(answers_before, answers_after, strict=True))
    result = RunResult(folder.path, before, after, divergence, answers, clock.seconds)
    _save(recipe, base, model, folder, result)
    manifest |= {
        "status": "complete",
        "before": asdict(before),
        "after": asdict(after),
        "divergence": asdict(divergence),
        "forgetting": result.forgetting,
        "seconds": result.seconds,
    }
    folder.write_manifest(manifest)
    return result


def _proxy_text(
    recipe: Recipe, base: LoadedModel, hardware: Hardware, folder: RunFolder, clock: Clock
) -> tuple[list[ProxySample], list[ProxySample]]:
    """Sampled text from the cache or from the model, and its held-out tail."""
    section = recipe.proxy
    template = base.tokenizer.chat_template if section.source != "bos" else None
    path = cache_path(base.fingerprint, str(hardware.dtype), template, section)
    samples = read_samples(path)
    if samples is None:
        with clock.stage(
            "sampling text from the base model", section.num_samples + section.num_heldout_samples
        ) as done:
            samples = sample_proxy(base.model, base.tokenizer, section, done)
        write_samples(path, samples, base.tokenizer)
        clock.note(f"sampled text kept in {path}")
    else:
        clock.note(f"sampled text taken from {path}")
    write_samples(folder.proxy, samples, base.tokenizer)
    return samples[: section.num_samples], samples[section.num_samples :]


def _held_out(recipe: Recipe, base: LoadedModel, data: TaskTokens, proxy: Sequence[ProxySample]) -> HeldOut:
    size, device = recipe.evaluation.batch_size, base.model.device
    text = Path(recipe.evaluation.general_text) if recipe.evaluation.general_text else GENERAL_TEXT
    window = min(GENERAL_WINDOW, recipe.training.max_length)
    labelled = data.heldout.sequences
    return HeldOut(
        examples=data.task.heldout if recipe.evaluation.metric == "exact_match" else [],
        task=list(batches(labelled["input_ids"][:], size, device, labelled["labels"][:])),
        proxy_start=list(batches(whole(proxy), size, device)),
        proxy_crops=list(batches(crops(proxy, recipe.proxy.seed), size, device)),
        general=list(batches(text_windows(text, base.tokenizer, window), size, device)),
    )


def _measure(
    recipe: Recipe, base: LoadedModel, model: PeftModel, on: HeldOut, clock: Clock, title: str
) -> tuple[Measurements, list[Answer]]:
    with clock.stage(title, on.units) as done:
        return measure(model, base.tokenizer, on, recipe.evaluation, done)


def _gate(
    recipe: Recipe,
    base: LoadedModel,
    model: PeftModel,
    trainer: GatedTrainer,
    task: Tokenized,
    proxy: Sequence[ProxySample],
    folder: RunFolder,
    clock: Clock,
) -> None:
    """Statistics of both texts, the gates from them, and A's gated start."""
    size, device = recipe.proxy.batch_size, base.model.device
    rows = len(task.sequences)
    chosen = random.Random(recipe.training.seed).sample(range(rows), min(recipe.gate.num_task_samples, rows))
    task_text = list(batches(task.sequences[chosen]["input_ids"], size, device))
    # Another seed than the held-out crops': the same offsets would be no error, but need not be.
    proxy_text = list(batches(whole(proxy) + crops(proxy, recipe.proxy.seed + 1), size, device))
    total = statistics_passes(recipe.gate) * (len(task_text) + len(proxy_text))
    pairs = adapter_pairs(model)
    with clock.stage("statistics of both texts", total) as done:
        gates = build_gates(model, pairs, proxy_text, task_text, recipe.gate, done)
    clock.note(f"{len({id(g) for g in gates.values()})} gates for {len(gates)} adapted layers")
    save_gates(folder.gates, gates)
    if "a_start" in recipe.gate.places:
        start_gated(pairs, gates)
    trainer.gates = gates


def _train(trainer: GatedTrainer, folder: RunFolder, clock: Clock) -> None:
    arguments = trainer.args
    per_epoch = len(trainer.get_train_dataloader()) / arguments.gradient_accumulation_steps
    steps = arguments.max_steps if arguments.max_steps > 0 else max(1, round(per_epoch * arguments.num_train_epochs))
    with clock.stage("training", steps) as done:
        trainer.add_callback(Reporting(done, lambda line: folder.append_metrics({"stage": "training", **line})))
        trainer.train()
    state = trainer.state
    if arguments.load_best_model_at_end and state.best_metric is not None:
        clock.note(f"kept step {state.best_global_step}, with the least held-out loss: {state.best_metric:.4f}")


def _save(recipe: Recipe, base: LoadedModel, model: PeftModel, folder: RunFolder, result: RunResult) -> None:
    save_adapter(model, base, recipe.export, folder.adapter)
    base.tokenizer.save_pretrained(folder.adapter)
    base.model.generation_config.save_pretrained(folder.adapter)
    write_card(folder.adapter / "README.md", recipe, base, result.before, result.after, result.divergence)
    if result.answers:
        folder.write_lines(
            folder.answers,
            (
                {"prompt": old.prompt, "reference": old.reference, "before": old.answer, "after": new.answer}
                for old, new in result.answers
            ),
        )
