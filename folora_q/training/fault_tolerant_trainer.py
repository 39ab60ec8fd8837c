"""A fault-tolerant SFTTrainer: pre-flight check, batch splitting, skipped steps, several processes that agree."""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from contextlib import nullcontext
from dataclasses import dataclass
from math import ceil
from typing import Any, NoReturn, cast

import torch
from torch import Tensor
from torch.nn.parallel import DistributedDataParallel
from trl.models import get_act_offloading_ctx_manager

from folora_q.data.tokens import IGNORED
from folora_q.errors import RunError
from folora_q.evaluation.divergence import HeldOutText
from folora_q.evaluation.model_pair import ModelPair
from folora_q.kernels.compiled_layers import CompilationError
from folora_q.training.callbacks import Stopping
from folora_q.training.checkpoint_schema import PROGRESS, SavedProgress, read_saved
from folora_q.training.monitor import StepReading
from folora_q.training.objectives import Objective
from folora_q.training.resumable_trainer import ResumableTrainer
from folora_q.training.step_guards import longest_rows, rehearse_saving


@dataclass(frozen=True)
class Monitored:
    """Texts that are evaluated during training, in addition to the held-out rows.

    Attributes:
        generated_text: model-generated text for the KL from the base; None skips the KL.
        further_text: more such text, on which a budget is measured now and then.
        real_text: general texts whose loss is compared with the base's.
    """

    generated_text: HeldOutText | None = None
    further_text: HeldOutText | None = None
    real_text: Sequence[HeldOutText] = ()


class FaultTolerantTrainer(ResumableTrainer):
    """A trainer that survives faults, or loses no more than the steps since its last checkpoint.

    Args:
        objective: what is minimized.
        heldout: the task's held-out rows, as the objective measures them in `evaluate`.
        monitored: other texts to evaluate on.

    Attributes:
        model_pair: the model and its base, which is the model with the adapter off.
        reading: loss, gradient norm and tokens of the last step, even if it was skipped.
        stopping: handles signals; all processes stop after the same step.
    """

    def __init__(
        self, *args: Any, objective: Objective[Any], heldout: Any, monitored: Monitored, **kwargs: Any
    ) -> None:
        self.objective = objective
        self.stopping: Stopping | None = None
        self.heldout, self.monitored = heldout, monitored
        self.step_in_hand: int | None = None
        self.step_loss: Tensor | float = 0.0
        self.step_tokens: Tensor | int = 0
        self.reading = StepReading()
        self.loss_before: Tensor | None = None
        super().__init__(*args, **kwargs)
        # The texts are the same in every evaluation.
        self.model_pair = ModelPair(self.model, remember=True, processes=self.processes.readers)

    def before_first_step(self) -> None:
        """Run the pre-flight check, and restore the state that needs a running Trainer."""
        saved = None if self.continued is None else read_saved(self.continued / PROGRESS, SavedProgress)
        self.kernels.prepare(compiled=saved is not None and saved.compiled)
        self.rehearse()
        if self.continued is not None and saved is not None:
            self._bring_back(self.continued, saved)

    def rehearse(self) -> None:
        """Run the pre-flight check: a step on the longest batch, and a save.

        This finds too little memory or disk space early, as does the evaluation that follows if the recipe has some. It
        changes neither weights nor random states.

        Raises:
            RunError: a single sequence does not fit into memory, or nothing can be saved.
        """
        device = self.args.device
        tokens, rows = self._total_train_tokens, self.args.per_device_train_batch_size
        with torch.random.fork_rng(devices=[device] if device.type == "cuda" else []):
            self._try_step(longest_rows(self.train_dataset, rows))
            self._agree_on_rows()
            if self.continued is None and self.processes.count == 1:  # a resumed run computes its steps as before
                usual = [self.train_dataset[index] for index in range(min(rows, len(self.train_dataset)))]
                steps = (self.state.max_steps or 0) * self.current_gradient_accumulation_steps
                self.kernels.choose_by_time(lambda: self._try_step(usual), steps)
            trained = [p for p in self.model.parameters() if p.requires_grad]
            kept = self.kept if self.saves else 0
            self.processes.share(lambda: rehearse_saving(self.save_model, self.run, trained, kept))
        self.step_in_hand = None
        self._total_train_tokens = tokens
        for kind in self._metrics.values():
            kind.clear()

    def _agree_on_rows(self) -> None:
        """Let all processes split batches alike; later a process alone could not, since the others wait for it."""
        splitter = self.micro_batches.splitter
        if self.processes.count > 1:
            rows = self.args.per_device_train_batch_size
            splitter.rows = self.processes.least(splitter.fitting(rows))
            splitter.enabled = False
            self.micro_batches.stop_compiling = _end_without_compilation

    def get_batch_samples(self, epoch_iterator: Iterator, num_batches: int, device: torch.device) -> tuple[list, Any]:
        """Get the micro-batches of a step, without rows that accelerate repeats so that all processes have as many."""
        if self.processes.count > 1:
            epoch_iterator = self._without_repeated_rows(epoch_iterator)
        step, count = super().get_batch_samples(epoch_iterator, num_batches, device)
        if step:
            step = self.objective.prepare_step(self, step, cast(Tensor, count))
        return step, count

    def _get_num_items_in_batch(self, batch_samples: list, device: torch.device) -> Tensor | int | None:
        """Return the number of items, tokens or rows, over which a step's loss is a mean, of all processes."""
        if not batch_samples:
            return None
        count = torch.stack([self.objective.count(inputs) for inputs in batch_samples]).sum().to(device)
        return cast(Tensor, self.accelerator.gather(count)).sum() if self.args.world_size > 1 else count

    def _without_repeated_rows(self, epoch_iterator: Iterator) -> Iterator:
        """Yield micro-batches in which no token of a repeated row is trained."""
        size, accumulation = self.args.per_device_train_batch_size, self.args.gradient_accumulation_steps
        count, rank = self.processes.count, self.processes.rank
        rows = len(self.train_dataset)
        mine = ceil(rows / (size * count))  # micro-batches of this process in an epoch
        number = self.state.global_step % ceil(mine / accumulation) * accumulation
        for inputs in epoch_iterator:
            new = min(max(rows - (number * count + rank) * size, 0), size)
            inputs["labels"][new:] = IGNORED
            number += 1
            yield inputs

    def _try_step(self, rows: list[dict[str, Any]]) -> None:
        """Compute a micro-batch, wait for it, and discard its gradients."""
        inputs = self.data_collator(rows)
        count = self.objective.count(inputs).to(self.args.device)
        [inputs] = self.objective.prepare_step(self, [inputs], count)
        self.step_in_hand = None
        self.training_step(self.model, inputs, count).item()
        self.model.zero_grad(set_to_none=True)

    def measured_on_task(self) -> dict[str, float]:
        """Return the objective's measurements on the held-out rows."""
        return self.objective.measure(self.model_pair, self.heldout, self.measuring)

    def training_step(
        self, model: torch.nn.Module, inputs: dict[str, Any], num_items_in_batch: Tensor | None = None
    ) -> Tensor:
        """Compute a micro-batch, split into parts if it does not fit into memory."""
        step = super().training_step

        def compute(part: dict[str, Any], more: bool = False) -> Tensor:
            # Gradients of several processes are added up with the last part of a step only.
            later = model.no_sync() if more and isinstance(model, DistributedDataParallel) else nullcontext()
            part = self.objective.prepare(self, self._prepare_inputs(part))  # not with the step's kernels
            with self.kernels.active(), later:
                return step(model, part, num_items_in_batch)

        first, self.step_in_hand = self.step_in_hand != self.state.global_step, self.state.global_step
        if first:
            self.loss_before = self._tr_loss.clone()
        if num_items_in_batch is None:  # then the losses of parts would not add up
            loss = compute(inputs)
        else:
            loss = self.micro_batches.add(inputs, first, compute, lambda: self._clear_step(model))
        tokens = inputs["attention_mask"].sum() if "attention_mask" in inputs else inputs["input_ids"].numel()
        self.step_loss = loss if first else self.step_loss + loss  # both stay on the device
        self.step_tokens = tokens if first else self.step_tokens + tokens
        return loss

    def _clear_step(self, model: torch.nn.Module) -> None:
        """Forget the gradients of a step that ran out of memory, and the activations that it had moved to the host."""
        model.zero_grad(set_to_none=True)
        if self.args.activation_offloading:
            self.maybe_activation_offload_context = get_act_offloading_ctx_manager(model=self.model)

    def _get_grad_norm(self, model: torch.nn.Module, grad_norm: Any = None) -> Any:
        """Return the gradient norm, and skip a harmful step. The Trainer calls this right before each optimizer step.

        Raises:
            RunError: too many steps in a row were skipped.
        """
        norm = super()._get_grad_norm(model, grad_norm=grad_norm)
        scaled = getattr(self.accelerator, "scaler", None) is not None
        stop = self.stopping is not None and self.stopping.asked is not None
        numbers = (self.step_loss / self.processes.count, self.step_tokens, float(stop))  # each loss is a share
        seen = [torch.as_tensor(each, device=self.args.device).float() for each in numbers]
        sums = self.processes.sums(torch.stack(seen))
        numbers = torch.cat([sums, torch.as_tensor(norm, device=self.args.device).float().view(1)])
        loss, tokens, stops, size = numbers.tolist()  # the one synchronization with the device in a step
        if self.stopping is not None:
            self.stopping.agree(stops > 0)
        self.reading = StepReading(loss, size, round(tokens))
        # In float16 the loss scaler finds its scale from overflowing gradients, and skips those steps itself.
        reason = self.skipped.reason(loss, 0.0 if scaled else size)
        if reason is None:
            self.skipped.taken(loss)
            return norm
        if not scaled:
            model.zero_grad(set_to_none=True)
            # Makes accelerate's `optimizer.step()` do nothing; accelerate sets it again before every micro-batch.
            self.accelerator.gradient_state._set_sync_gradients(False)
        # Remove it from the running mean too, in which a non-finite value would stay (`tr_loss -= tr_loss`).
        assert self.loss_before is not None  # set by the step's first micro-batch
        self._tr_loss.copy_(self.loss_before)
        self._globalstep_last_logged += 1
        self.skipped.add(self.state.global_step + 1, loss, size, reason, self.last_good)
        return norm

    def log(self, logs: dict[str, float], start_time: float | None = None) -> None:
        if "train_loss" in logs:  # over all steps taken, including those before a resume
            logs["train_loss"] = self._total_loss_scalar / max(self.state.global_step - self.skipped.total, 1)
        if not math.isfinite(logs.get("grad_norm", 0.0)):
            del logs["grad_norm"]  # of a skipped step, which has its own line
        super().log(logs, start_time)


def _end_without_compilation(error: CompilationError) -> NoReturn:
    """End one of several processes: the others would not repeat the step with it."""
    raise RunError(error.message, "continue with --resume --force training.kernels=none") from error
