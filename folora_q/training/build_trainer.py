"""Build the trainer of a run from its recipe, model and data."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any
from unittest.mock import patch

from datasets import Dataset
from peft import PeftModel
from transformers import EarlyStoppingCallback, TrainerCallback
from transformers import PreTrainedTokenizerBase as Tokenizer
from trl import SFTConfig, pack_dataset
from trl.trainer import sft_trainer

from folora_q.core import SpectralGate
from folora_q.data.batch_splitting import BatchSplitter
from folora_q.distributed.processes import ONE, Processes
from folora_q.kernels.step_kernels import StepKernels
from folora_q.models.adapters import keep_in_float32
from folora_q.models.parts import embedding_rows
from folora_q.models.sharding import train_without_base
from folora_q.recipe.schema import Recipe
from folora_q.training.fault_tolerant_trainer import Monitored
from folora_q.training.objectives import objective_of
from folora_q.training.resumable_trainer import FaultTolerance
from folora_q.training.step_guards import MicroBatches, SkippedSteps
from folora_q.training.trainer import GatedTrainer


@dataclass(frozen=True, kw_only=True)
class TrainerSetup:
    """Everything that a trainer is built from.

    Attributes:
        train, heldout: columns `input_ids` and `labels`, and of pairs and labelled answers their further ones;
            `training.packing` packs `train`.
        config: from `trainer_config`.
        gates: by adapted layer, after `Rule.before_training`; None is plain QLoRA.
        notify: receives a line whenever memory runs out or a step is skipped.
        record: receives a line of metrics for each skipped step.
        note: receives a line for each measurement of a forgetting budget.
        processes: train together.
    """

    model: PeftModel
    tokenizer: Tokenizer
    train: Dataset
    heldout: Dataset
    recipe: Recipe
    config: SFTConfig
    gates: Mapping[str, SpectralGate] | None = None
    monitored: Monitored = Monitored()
    callbacks: Sequence[TrainerCallback] = ()
    notify: Callable[[str], None] = lambda line: None
    record: Callable[[dict[str, Any]], None] = lambda line: None
    note: Callable[[str], None] = lambda line: None
    processes: Processes = ONE


def build_trainer(setup: TrainerSetup) -> GatedTrainer:
    """Build a trainer on tokenized data."""
    recipe, model, training = setup.recipe, setup.model, setup.recipe.training
    train = setup.train
    if training.packing:
        train = pack_dataset(train.select_columns(["input_ids", "labels"]), training.max_length)
    objective = objective_of(training)
    callbacks = list(setup.callbacks)
    if training.early_stopping_patience is not None:
        callbacks.append(EarlyStoppingCallback(training.early_stopping_patience, training.early_stopping_threshold))
    start = {name: p.data for name, p in model.named_parameters() if p.requires_grad}
    with patch.object(sft_trainer, "BaseTunerLayer", ()):  # TRL refuses any adapter on the head
        trainer = GatedTrainer(
            model=model,
            args=setup.config,
            processing_class=setup.tokenizer,
            train_dataset=train,
            eval_dataset=setup.heldout,
            callbacks=callbacks,
            recipe=recipe,
            gates=setup.gates,
            note=setup.note,
            tolerance=_fault_tolerance(setup),
            data_collator=objective.collate,
            objective=objective,
            heldout=objective.held_out(setup.heldout[:], recipe.evaluation.batch_size, model.device),
            monitored=setup.monitored,
        )
    # TRL enables it for every forward pass; only training steps need it, and ask for it.
    model.config.get_text_config().output_router_logits = False
    if setup.processes.sharded:
        train_without_base(model)
    keep_in_float32(model, start)  # SFTTrainer casts adapters on a 4-bit base to bfloat16
    objective.prepare_model(model)
    return trainer


def _fault_tolerance(setup: TrainerSetup) -> FaultTolerance:
    training = setup.recipe.training
    factor = None if setup.config.fp16 else training.max_loss_factor  # the loss scaler decides then
    vocabulary = embedding_rows(setup.model)
    readers: dict[int, list[str]] = {}  # of each gate
    for name, gate in (setup.gates or {}).items():
        readers.setdefault(id(gate), []).append(name)
    kernels = StepKernels(setup.model, training.kernels, list(readers.values()), setup.notify)
    splits = training.auto_batch_size and setup.processes.independent
    splitter = BatchSplitter("training on", setup.notify, splits)
    return FaultTolerance(
        micro_batches=MicroBatches(splitter, kernels.stop_compiling),
        measuring=BatchSplitter("measuring", setup.notify, splits),
        skipped=SkippedSteps(training.max_skipped_steps, factor, vocabulary, setup.notify, setup.record),
        kernels=kernels,
        kept=training.save_total_limit,
        needs_saves=training.on_save_error == "stop",
        processes=setup.processes,
    )
