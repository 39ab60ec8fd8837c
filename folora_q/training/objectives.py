"""What training minimizes: the loss of tokens, DPO's loss of pairs, or KTO's of answers with a label.

Each is a mean over items, tokens or rows, of a complete optimizer step. A part of a step contributes the sum over its
items, divided by the step's number of items, so the step is the same however its batch is cut.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Mapping, Sequence
from typing import TYPE_CHECKING, Any, Generic, TypeVar, cast

import torch
from peft import PeftModel
from torch import Tensor
from torch.nn.functional import cross_entropy, pad
from transformers.loss.loss_utils import ForCausalLMLoss
from trl import SFTTrainer
from trl.trainer.utils import disable_dropout_in_model

from folora_q.data.batch_splitting import BatchSplitter, rows_of_inputs
from folora_q.data.pairs import DESIRABLE, padded_pairs
from folora_q.data.tokens import IGNORED, Batch, batches
from folora_q.evaluation.loss import mean_loss
from folora_q.evaluation.model_pair import ModelPair
from folora_q.evaluation.preference import (
    HeldOutAnswers,
    dpo_losses,
    held_out_answers,
    kto_losses,
    kto_reference,
    measure_rewards,
)
from folora_q.models.adapters import adapter_off, trains_head
from folora_q.recipe.objectives import OBJECTIVE_FACTS, ObjectiveName
from folora_q.recipe.training import TrainingSection

if TYPE_CHECKING:
    from folora_q.training.fault_tolerant_trainer import FaultTolerantTrainer

Inputs = dict[str, Any]
# What an objective measures held-out rows by.
HeldOutRows = TypeVar("HeldOutRows")


class Objective(ABC, Generic[HeldOutRows]):
    """An objective with a recipe's settings.

    Attributes:
        collate: makes a micro-batch of rows, (rows, ..., t); None is TRL's padding of single sequences.
    """

    collate: Callable[[list[dict[str, Any]]], Inputs] | None = None

    def __init__(self, training: TrainingSection) -> None:
        self.training = training

    def prepare_model(self, model: PeftModel) -> None:
        """Change what the objective needs changed in the model, once before training."""

    @abstractmethod
    def count(self, inputs: Inputs) -> Tensor:
        """Return the number of items in a micro-batch."""

    def prepare_step(self, trainer: FaultTolerantTrainer, step: Sequence[Inputs], count: Tensor) -> list[Inputs]:
        """Return the micro-batches of an optimizer step with what depends on all of them, in all processes.

        Args:
            count: the number of items in the step, of all processes.
        """
        return list(step)

    def prepare(self, trainer: FaultTolerantTrainer, inputs: Inputs) -> Inputs:
        """Return a part of a micro-batch with what must be computed outside of the kernels of training steps."""
        return inputs

    @abstractmethod
    def loss(
        self, trainer: FaultTolerantTrainer, model: torch.nn.Module, inputs: Inputs, count: Tensor | None
    ) -> tuple[Tensor, Any]:
        """Return the loss of a part of a step, and the model's outputs.

        Args:
            count: the number of items in the step, of all processes, whose gradients are averaged.
        """

    @abstractmethod
    def held_out(self, rows: Mapping[str, Any], size: int, device: torch.device) -> HeldOutRows:
        """Return held-out rows, given by column, in batches for `measure`."""

    @abstractmethod
    def measure(self, model_pair: ModelPair, rows: HeldOutRows, splitter: BatchSplitter) -> dict[str, float]:
        """Return the `loss` on held-out rows, and other measurements by name; all processes of the pair take part."""


class Supervised(Objective[list[Batch]]):
    """The loss of the tokens to learn."""

    def count(self, inputs: Inputs) -> Tensor:
        return (inputs["labels"][..., 1:] != IGNORED).sum()

    def loss(
        self, trainer: FaultTolerantTrainer, model: torch.nn.Module, inputs: Inputs, count: Tensor | None
    ) -> tuple[Tensor, Any]:
        if _head_is_fused(trainer):
            return SFTTrainer.compute_loss(trainer, model, inputs, num_items_in_batch=count), None
        outputs, targets = _logits(trainer, model, inputs)
        words = outputs.logits.shape[-1]
        loss = ForCausalLMLoss(outputs.logits, None, words, num_items_in_batch=count, shift_labels=targets)
        if count is not None:  # the tokens of all processes, whose gradients are averaged
            loss = loss * trainer.processes.count
        return _with_router_loss(trainer, loss, outputs), outputs

    def held_out(self, rows: Mapping[str, Any], size: int, device: torch.device) -> list[Batch]:
        return list(batches(rows["input_ids"], size, device, rows["labels"]))

    def measure(self, model_pair: ModelPair, rows: list[Batch], splitter: BatchSplitter) -> dict[str, float]:
        with model_pair.tuned() as tuned:
            return {"loss": mean_loss(tuned, rows, splitter=splitter, processes=model_pair.processes)}


class Rewarding(Objective[HeldOutAnswers]):
    """An objective on implicit rewards β r of rows with two sequences, with r = log π(answer) / π_base(answer).

    The base is the model with its adapter off. Its log-probabilities are computed in each step, in a forward pass
    without gradients: that keeps nothing in memory or in checkpoints, and in one epoch costs what it would cost before.
    """

    collate = staticmethod(padded_pairs)

    def prepare_model(self, model: PeftModel) -> None:
        """Switch off the dropout that some families have of their own, which would be noise in r, as TRL does."""
        disable_dropout_in_model(model)

    def count(self, inputs: Inputs) -> Tensor:
        return _rows_that_count(inputs).sum()

    def prepare(self, trainer: FaultTolerantTrainer, inputs: Inputs) -> Inputs:
        # Fused adapters ignore that PEFT's adapters are off.
        with torch.no_grad(), adapter_off(trainer.model):
            return inputs | {"of_base": _log_probs(trainer, trainer.model, self.trained(inputs))[0]}

    def loss(
        self, trainer: FaultTolerantTrainer, model: torch.nn.Module, inputs: Inputs, count: Tensor | None
    ) -> tuple[Tensor, Any]:
        counted = _rows_that_count(inputs)
        log_probs, outputs = _log_probs(trainer, model, self.trained(inputs))
        losses = self.losses(self.training.beta * (log_probs - inputs["of_base"]), inputs)
        loss = (losses * counted).sum() / (counted.sum() if count is None else count)
        if count is not None:
            loss = loss * trainer.processes.count
        return _with_router_loss(trainer, loss, outputs), outputs

    @abstractmethod
    def trained(self, inputs: Inputs) -> Inputs:
        """Return the sequences that are trained on, (n, t), as the model's inputs."""

    @abstractmethod
    def losses(self, rewards: Tensor, inputs: Inputs) -> Tensor:
        """Return the loss of each row, (rows,), given the rewards of `trained`, (n,)."""

    def held_out(self, rows: Mapping[str, Any], size: int, device: torch.device) -> HeldOutAnswers:
        return held_out_answers(rows, self.training, size, device)

    def measure(self, model_pair: ModelPair, rows: HeldOutAnswers, splitter: BatchSplitter) -> dict[str, float]:
        found = measure_rewards(model_pair, rows, splitter=splitter)
        measured = {"loss": found.loss.tuned.value, "reward_accuracy": found.accuracy.value}
        measured |= {} if found.margin is None else {"reward_margin": found.margin.value}
        return measured | ({} if found.reference is None else {"reward_reference": found.reference})


class DirectPreference(Rewarding):
    """Direct Preference Optimization (arXiv 2305.18290): -log σ(β (r₊ - r₋))."""

    def trained(self, inputs: Inputs) -> Inputs:
        """Return both answers of each pair, one below the other, (2 pairs, t)."""
        return {name: inputs[name].flatten(0, 1) for name in MODEL_INPUTS}

    def losses(self, rewards: Tensor, inputs: Inputs) -> Tensor:
        return dpo_losses(rewards.view(-1, 2))


class KahnemanTversky(Rewarding):
    """Kahneman-Tversky Optimization (arXiv 2402.01306): w (1 - σ(β r - z)), or w (1 - σ(z - β r)) if undesirable.

    z ≥ 0 estimates β KL(π ‖ π_base) by the mean of β r over mismatched answers, without gradients. In TRL that is a
    mean over a forward pass. Here it is one over all rows of the optimizer step, so the step does not depend on how its
    rows are cut; both models read them before its first forward pass with gradients.
    """

    def prepare_step(self, trainer: FaultTolerantTrainer, step: Sequence[Inputs], count: Tensor) -> list[Inputs]:
        """Return the micro-batches with z as `reference`, (rows,)."""
        total = torch.zeros((), device=trainer.args.device)
        for inputs in step:
            total += self._mismatched_rewards(trainer, inputs)
        reference = kto_reference(trainer.processes.sums(total) / count.to(total.device))
        return [inputs | {"reference": reference.expand(len(inputs["input_ids"]))} for inputs in step]

    def _mismatched_rewards(self, trainer: FaultTolerantTrainer, inputs: Inputs) -> Tensor:
        """Return the sum of the rewards of a micro-batch's mismatched answers; rows without labels add 0."""
        rows, length = len(inputs["input_ids"]), inputs["input_ids"].shape[-1]

        def rewards(start: int, stop: int) -> Tensor:
            part = _side(cast(Inputs, trainer._prepare_inputs(rows_of_inputs(inputs, start, stop))), 1)
            tuned = _log_probs(trainer, trainer.model, part)[0]
            with adapter_off(trainer.model):
                return (tuned - _log_probs(trainer, trainer.model, part)[0]).sum()

        with torch.no_grad():
            parts = list(trainer.micro_batches.splitter.over(rows, length, rewards))
        return self.training.beta * torch.stack(parts).sum()

    def trained(self, inputs: Inputs) -> Inputs:
        """Return the rows' own answers, (rows, t)."""
        return _side(inputs, 0)

    def losses(self, rewards: Tensor, inputs: Inputs) -> Tensor:
        return kto_losses(rewards, inputs["reference"], inputs[DESIRABLE], self.training)


OBJECTIVES: dict[ObjectiveName, type[Objective[Any]]] = {
    "sft": Supervised,
    "dpo": DirectPreference,
    "kto": KahnemanTversky,
}
if OBJECTIVES.keys() != OBJECTIVE_FACTS.keys():
    raise TypeError(f"OBJECTIVE_FACTS has {tuple(OBJECTIVE_FACTS)}, OBJECTIVES has {tuple(OBJECTIVES)}")
MODEL_INPUTS = ("input_ids", "attention_mask", "labels")


def objective_of(training: TrainingSection) -> Objective[Any]:
    """Return the objective that a recipe names, with its settings."""
    return OBJECTIVES[training.objective](training)


def _rows_that_count(inputs: Inputs) -> Tensor:
    """Return which rows have labels, (rows,) bool; rows that only fill up a batch have none."""
    return (inputs["labels"][..., 1:] != IGNORED).flatten(1).any(1)


def _side(inputs: Inputs, side: int) -> Inputs:
    """Return one sequence of each row, (rows, t), as the model's inputs, without padding that only the other needs."""
    sequences = {name: inputs[name][:, side] for name in MODEL_INPUTS}
    return rows_of_inputs(sequences, 0, len(sequences["input_ids"]))


def _head_is_fused(trainer: FaultTolerantTrainer) -> bool:
    """Return whether TRL's chunked head computes the loss.

    It is made for Triton; without it, it also scores ignored positions, for half of the step. It uses the head's weight
    directly and bypasses the module, so an adapter on the head would learn nothing.
    """
    return trainer.args.device.type == "cuda" and not trains_head(trainer.model)


def _log_probs(trainer: FaultTolerantTrainer, model: torch.nn.Module, inputs: Inputs) -> tuple[Tensor, Any]:
    """Return log π(answer | prompt) of each sequence, (rows,), and the model's outputs."""
    if _head_is_fused(trainer):
        outputs = model(**inputs, use_cache=False, fused_lm_head=True, **_balancing(trainer))
        return outputs.log_probs.float().sum(1), outputs  # 0 where a token is not trained
    outputs, targets = _logits(trainer, model, inputs)
    words = outputs.logits.shape[-1]
    losses = cross_entropy(
        outputs.logits.float().view(-1, words), targets.flatten(), ignore_index=IGNORED, reduction="none"
    )
    return -losses.view_as(targets).sum(1), outputs


def _logits(trainer: FaultTolerantTrainer, model: torch.nn.Module, inputs: Inputs) -> tuple[Any, Tensor]:
    """Return the outputs with logits at the positions that predict a trained token, and these tokens, (rows, n)."""
    targets = pad(inputs["labels"][:, 1:], (0, 1), value=IGNORED)
    columns = (targets != IGNORED).any(0).nonzero()[:, 0]  # the head is applied to no other position
    others = {name: value for name, value in inputs.items() if name != "labels"}
    return model(**others, logits_to_keep=columns, **_balancing(trainer)), targets[:, columns]


def _balancing(trainer: FaultTolerantTrainer) -> dict[str, bool]:
    return {"output_router_logits": True} if trainer.aux_loss_enabled else {}


def _with_router_loss(trainer: FaultTolerantTrainer, loss: Tensor, outputs: Any) -> Tensor:
    """Add the load-balancing loss of a mixture of experts, a mean over a micro-batch."""
    if not trainer.aux_loss_enabled:
        return loss
    return loss + trainer.router_aux_loss_coef * outputs.aux_loss / trainer.current_gradient_accumulation_steps
