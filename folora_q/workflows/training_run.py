"""One training run in reading order: load, sample, calibrate, train, save, evaluate. Prints nothing."""

from __future__ import annotations

import math
import shlex
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from peft import PeftModel
from trl import SFTConfig

from folora_q.calibration.gate_store import gate_results, load_gates, save_gates
from folora_q.calibration.sample import ProxySample
from folora_q.calibration.sample_cache import SampledModel, load_or_sample, read_samples, write_samples
from folora_q.core import gates_on
from folora_q.data.batch_splitting import first_rows
from folora_q.data.tokens import batches
from folora_q.data.windows import crops
from folora_q.errors import FoloraError, RunError, UserError, first_line
from folora_q.evaluation.divergence import HeldOutText
from folora_q.evaluation.drift import predicted_drift
from folora_q.evaluation.evaluate import (
    HeldOut,
    HeldOutSources,
    Measurements,
    compare_texts,
    evaluate,
    evaluate_layers,
    held_out,
)
from folora_q.evaluation.kept import Kept
from folora_q.evaluation.model_pair import ModelPair
from folora_q.export.card import CARD, write_card
from folora_q.kernels.liger import apply_liger
from folora_q.memory.estimate import GIB, SHARDED
from folora_q.memory.micro_batches import of_all_processes, of_one_process
from folora_q.models.adapters import adapter_pairs, attach_adapter, names_of_base, save_adapter
from folora_q.models.earlier_adapter import save_earlier, stack
from folora_q.models.hardware import PeakMemory, used_memory
from folora_q.models.load import LoadedModel, load_model, require_loadable, stop_at
from folora_q.models.logits import verify_chunked_logits
from folora_q.models.parts import embedding_rows
from folora_q.models.target_modules import in_16_bits, listed, without_adapter
from folora_q.progress import Stage, StageTimer
from folora_q.recipe.strict_yaml import dump_yaml
from folora_q.rules import rule_of
from folora_q.runs.results import (
    GENERATED_TEXT,
    AnswerResult,
    Evaluation,
    LayerResult,
    TextKind,
    answer_lines,
    to_json,
)
from folora_q.storage.files import atomic_write, commit_directory
from folora_q.training.callbacks import Reporting, SavedAtTheEnd, Stopping
from folora_q.training.checkpoints import discard_after, step_of
from folora_q.training.config import trainer_config
from folora_q.training.monitor import Monitor
from folora_q.training.packing import check_packing
from folora_q.training.schedule import warmup_of
from folora_q.training.trainer import GatedTrainer, Monitored, TrainerSetup, build_trainer
from folora_q.workflows.calibration import Calibration, CalibrationText, EarlierRows, Gates
from folora_q.workflows.earlier_tasks import held_out_texts, score_earlier
from folora_q.workflows.keeping import BaseAnswers, from_samples, samples_of_all
from folora_q.workflows.prepare_training import PreparedRun
from folora_q.workflows.step_plan import plan_on
from folora_q.workflows.training_work import estimated_work, training_plan

Measured = tuple[Measurements, list[LayerResult]]


@dataclass(frozen=True)
class TrainingResult:
    """What a run learned, forgot and cost, with warnings about the reliability of its numbers."""

    folder: Path
    evaluation: Evaluation
    answers: list[AnswerResult]
    stages: list[Stage]
    warnings: list[str]


class TrainingRun:
    """A run from its prepared data to its results. It writes to its folder only.

    Args:
        prepared: everything that is known before the model is loaded.
        timer: times the stages, and passes notes on.
    """

    def __init__(self, prepared: PreparedRun, timer: StageTimer) -> None:
        self.prepared, self.timer = prepared, timer
        self.recipe, self.folder, self.data = prepared.recipe, prepared.folder, prepared.data
        self.hardware, self.manifest, self.resumed = prepared.hardware, prepared.manifest, prepared.resumed
        self.processes = prepared.processes
        timer.meter = PeakMemory(self.hardware.device)

    def run(self) -> TrainingResult | None:
        """Run all steps; the first of several processes alone saves, answers and has a result."""
        self.write_inputs()
        self.plan_steps()
        base = self.load_base()
        text = self.sample(base)
        kept = self.keep(base)
        measured_on = self.held_out(base, text, kept)
        model = self.attach_adapter(base)
        config = self.configure(model)  # before the statistics, which take long
        gates = self.calibrate(base, model, text, kept) if self.recipe.gate.enabled else None
        trainer = build_trainer(
            TrainerSetup(
                model=model,
                tokenizer=base.tokenizer,
                train=self.data.train.sequences,
                heldout=self.data.heldout.sequences,
                recipe=self.recipe,
                config=config,
                gates=gates,
                monitored=self.monitored(base, text, measured_on),
                notify=self.timer.warn,
                record=self._record,
                note=self.timer.note,
                processes=self.processes,
            )
        )
        self.train(trainer)
        if self.processes.first:
            self.save(base, model)  # before the evaluation, which can fail and must not cost what was trained
            return self.evaluate(base, trainer, measured_on)
        if self.processes.sharded:
            self.measure(trainer, measured_on)  # all compute the same, as their parts of the base are needed
        else:
            compare_texts(self.model_pair(trainer), measured_on, self.timer)
        return None

    def write_inputs(self) -> None:
        """Write the recipe with all its defaults, and the rows that were left out."""
        if skipped := self.data.skipped():
            self.folder.write_lines(self.folder.skipped, skipped)
        atomic_write(self.folder.recipe, dump_yaml(self.prepared.request.recipe.model_dump(mode="json")))

    def plan_steps(self) -> None:
        """Choose by the GPU's memory how steps are computed and where the base is; a CPU follows the recipe.

        Raises:
            UserError: there is no such model, or it cannot be computed as the recipe says.
        """
        recipe, count, trust = self.recipe, self.processes.count, self.prepared.request.trust
        config = require_loadable(recipe.model, trust)
        try:
            plan = plan_on(self.hardware, of_one_process(recipe, count), config, self.processes)
        except UserError as error:
            self.timer.note(f"the batch is computed as the recipe says: {first_line(error.message)}")
            plan = None
        if plan is not None:
            self.recipe = of_all_processes(plan.recipe, count)
            who = "each step computes" if count == 1 else "in each step every GPU computes"
            self.timer.note(f"{who} {plan}; at most {plan.memory.peak / GIB:.1f} GiB by the estimate")
            self.timer.note(plan.calibration)
        if (place := self.recipe.model.fsdp) in SHARDED:
            if recipe.model.adapter is not None:
                raise UserError(
                    "this base is sharded (model.fsdp), and one with a model.adapter must be complete on each GPU",
                    "set model.fsdp: none, or merge the adapter (folora-q merge) and name the merged model",
                )
            if recipe.training.kernels == "compile":
                raise UserError(
                    "training.kernels: compile needs a complete base, and this one is sharded (model.fsdp)",
                    "set training.kernels: auto",
                )
            self.processes = replace(self.processes, sharded=True)
            self.timer.note(f"each process has a part of the base (model.fsdp: {place})")

    def load_base(self) -> LoadedModel:
        """Load the base model in 4 bits, and check that a resumed run started with the same one."""
        recipe, note = self.recipe, self.timer.note
        note(f"computing in {self.hardware}")
        if self.processes.count > 1:
            note(f"one of {self.processes.count} processes, which share the work")
        elif self.hardware.others is not None:
            note(self.hardware.others)
        with self.timer.stage("loading the model in 4 bits", None):
            trust = self.prepared.request.trust
            base = load_model(recipe.model, self.hardware, self.prepared.tokenizer, trust, self.processes)
        for data in (self.data, *(task.data for task in self.prepared.earlier)):
            for token in data.ends_of_turn:
                stop_at(base.model, token)
        first = torch.tensor([self.data.train.sequences[0]["input_ids"][:16]], device=base.model.device)
        if recipe.training.kernels == "liger":
            apply_liger(base.model, first)
        verify_chunked_logits(base.model, first)  # statistics, KL and losses all rest on it
        note(f"{base.quantized_modules} linear layers in 4 bits ({base.quantization})")
        note(f"in 16 bits: {listed(in_16_bits(base.model))} of the weights")
        if self.resumed is not None:
            self.manifest["files_sha256"] = self.resumed.require_model(base.fingerprint)
        self.manifest["model"] = {"name": base.name, "revision": base.revision, "fingerprint": base.fingerprint}
        if base.earlier is not None:
            note(f"the base carries {base.earlier.name}: this is the model that is compared with and preserved")
            self.manifest["model"] |= {"adapter": base.earlier.name, "adapter_fingerprint": base.earlier.fingerprint}
            if base.earlier.base not in ("", base.name, recipe.export.base_model_name_or_path):
                self.timer.warn(
                    f"{base.earlier.name} was trained on {base.earlier.base}: is {base.name} the same model?"
                )
            if self.processes.first and not self.folder.earlier.is_dir():
                save_earlier(base.earlier, self.folder.earlier, names_of_base(base, recipe.export))
        return base

    def sample(self, base: LoadedModel) -> CalibrationText:
        """Get the sampled text from the resumed run, from the cache, or from the model."""
        section, path = self.recipe.proxy, self.folder.proxy

        def kept() -> list[ProxySample] | None:
            if self.resumed is None or not self.resumed.keeps(path):
                return None
            return read_samples(path, embedding_rows(base.model))

        samples = self.processes.share(kept)
        if samples is None:
            sampled = SampledModel(base.model, base.tokenizer, base.fingerprint, self.hardware.dtype)
            work = estimated_work(self.recipe, self.data, self.hardware.device.type == "cuda", self.prepared.kept)
            self.timer.note(work.sentence(sampled.cached(section).exists()))
            samples = load_or_sample(sampled, section, self.timer, self.processes)
            write_samples(path, samples, base.tokenizer)
        self._remember(path)
        return CalibrationText(samples[: section.num_samples], samples[section.num_samples :])

    def keep(self, base: LoadedModel) -> list[Kept]:
        """Get the base's answers to the prompts to keep: from the resumed run, the cache, or the model."""
        sources, path = self.prepared.kept, self.folder.keep
        if not sources:
            return []

        def earlier() -> list[Kept] | None:
            if self.resumed is None or not self.resumed.keeps(path):
                return None
            return from_samples(sources, read_samples(path, embedding_rows(base.model)) or [])

        kept = self.processes.share(earlier)
        if kept is None:
            answering = SampledModel(base.model, base.tokenizer, base.fingerprint, self.hardware.dtype)
            size = self.recipe.evaluation.batch_size
            kept = BaseAnswers(answering, size, self.timer, self.processes).kept(sources)
            write_samples(path, samples_of_all(kept), base.tokenizer)
        self._remember(path)
        return kept

    def held_out(self, base: LoadedModel, text: CalibrationText, kept: list[Kept]) -> HeldOut:
        """Gather the texts for the evaluation after training."""
        recipe = self.recipe
        monitored = recipe.evaluation.num_proxy_samples if recipe.gate.budget is not None else 0
        unseen = [sample.ids for sample in text.held_out[monitored:]]  # by a budget's controller
        sources = HeldOutSources(unseen, recipe.proxy.seed, self.data, kept, recipe.training.beta_of_pairs)
        on = held_out(
            self.prepared.tokenizer, recipe.evaluation, base.model.device, sources, recipe.training.max_length
        )
        earlier = held_out_texts(self.prepared.earlier, recipe.evaluation.batch_size, base.model.device)
        return replace(on, texts=[*on.texts, *earlier])

    def monitored(self, base: LoadedModel, text: CalibrationText, measured_on: HeldOut) -> Monitored:
        """Choose the texts to monitor in training: held-out samples, in full and cropped, and windows of real text."""
        section = self.recipe.evaluation
        ids = [sample.ids for sample in text.held_out[: section.num_proxy_samples]]
        both = [*ids, *crops(ids, self.recipe.proxy.seed)]
        generated = HeldOutText(
            GENERATED_TEXT, TextKind.GENERATED, list(batches(both, section.batch_size, base.model.device))
        )
        general = [each for each in measured_on.texts if each.kind is TextKind.GENERAL]
        windows = math.ceil(section.num_proxy_samples / max(len(general), 1))
        return Monitored(generated, [replace(each, batches=first_rows(each.batches, windows)) for each in general])

    def attach_adapter(self, base: LoadedModel) -> PeftModel:
        """Attach the adapter to the base model."""
        model = attach_adapter(base, self.recipe.adapter, self.recipe.training.seed)
        parts = without_adapter(model)
        left_out = f"; none on {listed(parts)} of the weights" if parts else ""
        self.timer.note(f"adapters on {len(adapter_pairs(model))} linear layers{left_out}")
        if self.recipe.training.packing:
            rows = self.data.train.sequences
            check_packing(model, rows[0]["input_ids"], rows[len(rows) - 1]["input_ids"])
        return model

    def configure(self, model: PeftModel) -> SFTConfig:
        """Configure the trainer, and report settings that are allowed but rarely intended.

        Raises:
            UserError: transformers rejects a combination of settings, or this model does not support it.
        """
        config = trainer_config(model, self.recipe, self.hardware, self.folder.path, self.processes.count)
        for advice in self.recipe.advice:
            self.timer.warn(advice)
        return config

    def calibrate(self, base: LoadedModel, model: PeftModel, text: CalibrationText, kept: list[Kept]) -> Gates:
        """Compute the gates, or load those of the resumed run, and initialize A from them."""
        pairs, path, section = adapter_pairs(model), self.folder.gates, self.recipe.gate
        on_gpu = self.hardware.device.type == "cuda"
        identity = f"{base.fingerprint} {self.hardware} {self.recipe.training.kernels == 'liger'}"
        rows = self.data.train.sequences
        readers = self.processes.readers
        earlier = self.earlier_rows()
        calibration = Calibration(
            self.recipe, base.tokenizer, rows, self.timer, on_gpu, identity, readers, kept, earlier
        )
        resumed, processes = self.resumed, self.processes
        if processes.share(lambda: resumed is not None and resumed.keeps(path)):
            gates = processes.share(lambda: load_gates(path))
        else:
            gates = calibration.gates(model, text.seen)
            save_gates(path, gates)
            if resumed is not None:
                processes.share(lambda: resumed.require_gates(path))
            gates = processes.share(lambda: gates_on(gates, "cpu"))  # of other processes they differ by rounding
        gates = gates_on(gates, base.model.device)
        self.timer.note(f"{len({id(gate) for gate in gates.values()})} gates for {len(gates)} adapted layers")
        rule = rule_of(section)
        rule.initialize(pairs, gates, section)  # a checkpoint later restores its own A
        penalties = calibration.penalties(model, gates, text)
        atomic_write(self.folder.gate_results, to_json(gate_results(gates, penalties)))
        self._remember(path)
        return rule.before_training(pairs, gates)

    def earlier_rows(self) -> EarlierRows:
        """Return training rows of the earlier tasks, as many of each, for the penalty."""
        gate, seed = self.recipe.gate, self.recipe.training.seed
        rows = [task.rows(gate.num_task_samples, seed) for task in self.prepared.earlier]
        return [each for ids, _ in rows for each in ids], [each for _, labels in rows for each in labels]

    def train(self, trainer: GatedTrainer) -> None:
        """Train to the end, from a checkpoint if the run is resumed.

        Raises:
            KeyboardInterrupt: a signal asked to stop.
            RunError: training failed, or nothing was learned.
        """
        training, note = self.recipe.training, self.timer.note
        if training.packing:
            note(f"packed into {len(trainer.train_dataset):,} sequences")
        checkpoint = self.resumed.checkpoint if self.resumed is not None else None
        steps = training.steps_for(len(trainer.train_dataset))
        if (warmup := warmup_of(training.warmup_steps, steps)) < int(training.warmup_steps):
            note(f"training.warmup_steps: {warmup} of {steps} steps, at most a third, not {training.warmup_steps:g}")
        trainer.stopping = stopping = Stopping(note, alone=self.processes.count == 1)
        self.timer.show(training_plan(trainer.model, self.recipe, self.data, len(trainer.train_dataset)))
        with self.timer.stage("training", steps, "steps") as done:
            if checkpoint is not None:
                done(step_of(checkpoint))
            monitor = Monitor(self.timer.show, lambda: trainer.reading, lambda: used_memory(self.hardware.device))
            for callback in (Reporting(done, self._record), monitor, SavedAtTheEnd(), stopping):
                trainer.add_callback(callback)
            with stopping.listening():
                trainer.train(checkpoint)
        trainer.conclude(steps, note)
        if trainer.budget is not None:
            self.manifest["budget"] = trainer.budget.to_dict()
        trainer.require_learned()

    def save(self, base: LoadedModel, model: PeftModel) -> None:
        """Save the adapter, with a card that has no results yet; with an earlier one their sum, and what was added."""
        export = self.recipe.export
        if base.earlier is not None:
            with commit_directory(self.folder.added) as staging:
                save_adapter(model, base, export, staging)
                base.tokenizer.save_pretrained(staging)
                base.model.generation_config.save_pretrained(staging)
                (staging / CARD).unlink(missing_ok=True)  # PEFT's, which would say that this is a complete adapter
        with commit_directory(self.folder.adapter) as staging:
            if base.earlier is None:
                save_adapter(model, base, export, staging)
            else:
                stack(base.earlier, self.folder.added, staging, getattr(torch, export.adapter_dtype))
            base.tokenizer.save_pretrained(staging)
            base.model.generation_config.save_pretrained(staging)
            write_card(staging / CARD, self.recipe, base, None)

    def model_pair(self, trainer: GatedTrainer) -> ModelPair:
        """Return the tuned model and its base, which all processes compare."""
        return ModelPair(trainer.model, processes=self.processes.readers)

    def measure(self, trainer: GatedTrainer, measured_on: HeldOut) -> Measured:
        """Measure what was learned and forgotten; with a sharded base all processes do, at the same time."""
        pair, gates = self.model_pair(trainer), trainer.gates
        of_texts = evaluate(pair, measured_on, self.recipe.evaluation, self.prepared.scorer, self.timer)
        predicted = None if gates is None else predicted_drift(trainer.model, gates)
        layers = evaluate_layers(pair, measured_on, self.timer, predicted, trainer.energy_kept())
        return of_texts, layers

    def evaluate(self, base: LoadedModel, trainer: GatedTrainer, measured_on: HeldOut) -> TrainingResult:
        """Measure what was learned and forgotten, and complete the run.

        Raises:
            RunError: the evaluation failed; the adapter is saved.
        """
        recipe, folder = self.recipe, self.folder
        try:
            found, layers = self.measure(trainer, measured_on)
        except Exception as error:
            raise self._evaluation_failed(error) from error
        held = f"4 bits ({base.quantization}), computing in {self.hardware}"
        earlier = score_earlier(self.model_pair(trainer), self.prepared.earlier, self.timer)
        named = base.name if base.earlier is None else f"{base.name} with {Path(base.earlier.name).name}"
        evaluation = Evaluation(
            tuned=folder.path.name,
            base=named,
            held=held,
            texts=found.texts,
            score=found.score,
            layers=layers,
            kept=found.kept,
            earlier=earlier,
            preference=found.preference,
        )
        atomic_write(folder.evaluation, to_json(evaluation))
        folder.write_lines(folder.answers, answer_lines(found.answers))
        write_card(folder.adapter / CARD, recipe, base, evaluation)
        self.manifest.update(status="complete", stages=self.timer.to_list())
        folder.write_manifest(self.manifest)
        if not trainer.saves:
            discard_after(folder.path, 0)  # the checkpoint at the end of training, or of a signal
        stages = list(self.timer.stages.values())
        return TrainingResult(folder.path, evaluation, found.answers, stages, self.manifest["warnings"])

    def _remember(self, path: Path) -> None:
        """Record the checksum of a finished file of the run; others than the first process may not have it."""
        if self.processes.first:
            self.folder.remember(self.manifest, path)

    def _record(self, line: dict[str, Any]) -> None:
        self.folder.append_metrics({"stage": "training", **line})

    def _evaluation_failed(self, error: Exception) -> RunError:
        """Return the error to raise: what is kept, and how to repeat the evaluation without training again."""
        folder, request = self.folder, self.prepared.request
        reason = error.message if isinstance(error, FoloraError) else f"{type(error).__name__}: {first_line(error)}"
        options = [*["--allow-code"] * (self.recipe.evaluation.metric == "function"), *request.trust.flags()]
        line = shlex.join(["folora-q", "eval", str(folder.path), *options])
        helps = f"{error.hint}; " if isinstance(error, FoloraError) and error.hint else ""
        return RunError(
            f"the evaluation failed: {reason}; the adapter that was trained is in {folder.adapter}",
            f"{helps}`{line}` repeats the evaluation alone; `folora-q train` with --resume repeats it and ends the run",
        )
