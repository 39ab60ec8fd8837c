"""One training run in reading order: its inputs, the adapter, gates, training, evaluation. Prints nothing."""

from __future__ import annotations

import shlex
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from peft import PeftModel
from trl import SFTConfig

from folora_q.calibration.gate_store import gate_results, load_gates, save_gates
from folora_q.core import gates_on
from folora_q.errors import FoloraError, RunError, first_line
from folora_q.evaluation.drift import predicted_drift
from folora_q.evaluation.evaluate import (
    HeldOut,
    Measurements,
    compare_texts,
    evaluate,
    evaluate_layers,
)
from folora_q.evaluation.kept import Kept
from folora_q.evaluation.model_pair import ModelPair
from folora_q.export.card import CARD, write_card
from folora_q.models.adapters import adapter_pairs, attach_adapter, save_adapter
from folora_q.models.earlier_adapter import stack
from folora_q.models.hardware import used_memory
from folora_q.models.load import LoadedModel
from folora_q.models.target_modules import listed, without_adapter
from folora_q.progress import Stage
from folora_q.rules import rule_of
from folora_q.runs.result_files import answer_lines, to_json
from folora_q.runs.results import AnswerResult, Evaluation, LayerResult
from folora_q.storage.files import atomic_write, commit_directory
from folora_q.training.build_trainer import TrainerSetup, build_trainer
from folora_q.training.callbacks import Reporting, SavedAtTheEnd, Stopping
from folora_q.training.checkpoints import discard_after, step_of
from folora_q.training.config import trainer_config
from folora_q.training.monitor import Monitor
from folora_q.training.packing import check_packing
from folora_q.training.schedule import warmup_of
from folora_q.training.trainer import GatedTrainer
from folora_q.workflows.calibration import Calibration, CalibrationText, EarlierRows, Gates
from folora_q.workflows.earlier_tasks import score_earlier
from folora_q.workflows.run_inputs import RunInputs
from folora_q.workflows.training_work import training_plan

Measured = tuple[Measurements, list[LayerResult]]


@dataclass(frozen=True)
class TrainingResult:
    """What a run learned, forgot and cost, with warnings about the reliability of its numbers."""

    folder: Path
    evaluation: Evaluation
    answers: list[AnswerResult]
    stages: list[Stage]
    warnings: list[str]


class TrainingRun(RunInputs):
    """A run from its prepared data to its results. It writes to its folder only.

    Args:
        prepared: everything that is known before the model is loaded.
        timer: times the stages, and passes notes on.
    """

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
            self.manifest["budget"] = trainer.budget.to_dict() | {"seconds": trainer.budget.seconds}
            if trainer.budget.exceeded:
                warning = (
                    f"gate.budget was not kept: {trainer.budget.spent:.4f} of {trainer.budget.plan.limit:g} nats per "
                    "token were spent, by the texts that steer it; rounding in 16 bits alone can make .002 "
                    "(model.dtype: float32 has none)"
                )
                self.timer.warn(warning)
                self.manifest["warnings"].append(warning)
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
