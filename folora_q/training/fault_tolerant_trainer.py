"""A fault-tolerant SFTTrainer: pre-flight check, batch splitting, skipped steps, atomic checkpoints, exact resume.

It overrides single steps of the Trainer, of transformers 5.17 to 5.23; the training loop is the Trainer's own.
"""

from __future__ import annotations

import json
import math
from collections import defaultdict
from collections.abc import Iterator, Mapping, Sequence
from contextlib import nullcontext
from dataclasses import dataclass
from math import ceil
from pathlib import Path
from pickle import UnpicklingError
from tempfile import TemporaryDirectory
from typing import Any, cast

import torch
from datasets import Dataset
from peft import PeftModel
from safetensors import SafetensorError
from torch import Tensor
from torch.nn.parallel import DistributedDataParallel
from transformers.trainer_callback import ExportableState
from trl import SFTConfig, SFTTrainer
from trl.models import get_act_offloading_ctx_manager

from folora_q.data.batch_splitting import BatchSplitter
from folora_q.data.tokens import IGNORED, Batch
from folora_q.distributed.processes import ONE, Processes
from folora_q.errors import FoloraError, RunError, first_line
from folora_q.evaluation.divergence import HeldOutText
from folora_q.evaluation.loss import mean_loss
from folora_q.evaluation.model_pair import ModelPair
from folora_q.kernels.step_kernels import StepKernels
from folora_q.models.parts import base_of
from folora_q.storage.files import atomic_write, commit_directory
from folora_q.training.callbacks import Stopping
from folora_q.training.checkpoint_schema import PROGRESS, TRAINER_STATE, SavedProgress, SavedState, read_saved
from folora_q.training.checkpoints import checkpoint_path, damage, rotate, seal, step_of
from folora_q.training.monitor import StepReading
from folora_q.training.step_guards import MicroBatches, SkippedSteps, longest_rows, rehearse_saving

# Private members of transformers' and TRL's trainers that this subclass overrides or relies on (5.17 to 5.23). A test
# looks for each in the installed versions, so that an upgrade which renames one fails there and not in a run.
OVERRIDDEN = ("_get_grad_norm", "_run_epoch", "_save_checkpoint", "_load_best_model")
RELIED_ON = (
    *("_tr_loss", "_total_loss_scalar", "_globalstep_last_logged", "_total_train_tokens", "_metrics"),
    *("_save_optimizer_and_scheduler", "_save_scaler", "_save_rng_state"),
)
# What torch, safetensors and transformers raise for invalid checkpoint content, before the first step.
UNFIT = (
    *(OSError, ValueError, TypeError, LookupError, AttributeError, RuntimeError, ArithmeticError, EOFError),
    SafetensorError,
)


@dataclass
class FaultTolerance:
    """How a run reacts to faults.

    Attributes:
        micro_batches, measuring: split batches that do not fit into memory.
        skipped: detects and counts skipped steps.
        kernels: compute training steps, and fall back to others if they fail.
        kept: number of checkpoints to keep.
        needs_saves: whether a checkpoint that cannot be written ends the run.
        processes: of the run; they react together.
    """

    micro_batches: MicroBatches
    measuring: BatchSplitter
    skipped: SkippedSteps
    kernels: StepKernels
    kept: int = 2
    needs_saves: bool = True
    processes: Processes = ONE


@dataclass(frozen=True)
class Monitored:
    """Texts that are evaluated during training, in addition to the held-out rows.

    Attributes:
        generated_text: model-generated text for the KL from the base; None skips the KL.
        real_text: general texts whose loss is compared with the base's.
    """

    generated_text: HeldOutText | None = None
    real_text: Sequence[HeldOutText] = ()


class FaultTolerantTrainer(SFTTrainer):
    """A trainer that survives faults, or loses no more than the steps since its last checkpoint.

    Args:
        tolerance: how it reacts to faults.
        heldout: the task's held-out rows, for the loss in `evaluate`.
        monitored: other texts to evaluate on.

    Attributes:
        exceeded: the step and the KL at which training stopped because the KL exceeded its limit.
        model_pair: the model and its base, which is the model with the adapter off.
        reading: loss, gradient norm and tokens of the last step, even if it was skipped.
    """

    model: PeftModel
    args: SFTConfig
    train_dataset: Dataset

    def __init__(
        self, *args: Any, tolerance: FaultTolerance, heldout: Sequence[Batch], monitored: Monitored, **kwargs: Any
    ) -> None:
        self.micro_batches, self.measuring = tolerance.micro_batches, tolerance.measuring
        self.skipped, self.kept, self.needs_saves = tolerance.skipped, tolerance.kept, tolerance.needs_saves
        self.kernels, self.processes = tolerance.kernels, tolerance.processes
        self.stopping: Stopping | None = None
        self.heldout, self.generated_text, self.real_text = heldout, monitored.generated_text, monitored.real_text
        self.exceeded: tuple[int, float] | None = None
        self.last_good: Path | None = None
        self.continued: Path | None = None
        self.ended = False
        self.step_in_hand: int | None = None
        self.step_loss: Tensor | float = 0.0
        self.step_tokens: Tensor | int = 0
        self.reading = StepReading()
        self.loss_before: Tensor | None = None
        super().__init__(*args, **kwargs)
        self.model_pair = ModelPair(self.model, remember=True)  # the texts are the same in every evaluation

    def train(self, resume_from_checkpoint: str | Path | None = None, **kwargs: Any) -> Any:
        """Train, or resume from a checkpoint as if training had never stopped.

        Args:
            resume_from_checkpoint: a complete checkpoint (`folora_q.training.checkpoints.newest_whole`).
        """
        if resume_from_checkpoint is None:
            return super().train(**kwargs)
        self.continued = checkpoint = Path(resume_from_checkpoint)
        self.args.eval_on_start = False  # it was evaluated at the first start
        try:
            for name, kind in ((TRAINER_STATE, SavedState), (PROGRESS, SavedProgress)):
                read_saved(checkpoint / name, kind)
            return super().train(resume_from_checkpoint=str(resume_from_checkpoint), **kwargs)
        except UnpicklingError as error:  # torch loads nothing but tensors and numbers
            raise RunError(
                f"{resume_from_checkpoint} holds more than tensors and numbers, which can be code; it was not loaded",
                "training saves no other objects; delete this checkpoint, and --resume falls back to the previous one",
            ) from error
        except UNFIT as error:
            if self.state.global_step > step_of(checkpoint):  # then the checkpoint is not the cause
                raise
            raise RunError(
                f"cannot resume from {checkpoint}: {first_line(error)}",
                "it may come from another version; delete it, and --resume falls back to the previous checkpoint",
            ) from error

    @property
    def run(self) -> Path:
        """The run folder."""
        assert self.args.output_dir is not None
        return Path(self.args.output_dir)

    @property
    def saves(self) -> bool:
        """Whether the recipe asks for checkpoints, which are then kept after training."""
        return self.args.save_strategy != "no"

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

    def get_batch_samples(self, epoch_iterator: Iterator, num_batches: int, device: torch.device) -> tuple[list, Any]:
        """Get the micro-batches of a step, without rows that accelerate repeats so that all processes have as many."""
        if self.processes.count > 1:
            epoch_iterator = self._without_repeated_rows(epoch_iterator)
        return super().get_batch_samples(epoch_iterator, num_batches, device)

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
        count = (inputs["labels"] != IGNORED).sum().to(self.args.device)
        self.step_in_hand = None
        self.training_step(self.model, inputs, count).item()
        self.model.zero_grad(set_to_none=True)

    def loss_of(self, rows: Sequence[Batch]) -> float:
        """Return the mean loss per token of held-out batches."""
        return mean_loss(base_of(self.model), rows, splitter=self.measuring)

    def training_step(
        self, model: torch.nn.Module, inputs: dict[str, Any], num_items_in_batch: Tensor | None = None
    ) -> Tensor:
        """Compute a micro-batch, split into parts if it does not fit into memory."""
        step = super().training_step

        def compute(part: dict[str, Any], more: bool = False) -> Tensor:
            # Gradients of several processes are added up with the last part of a step only.
            later = model.no_sync() if more and isinstance(model, DistributedDataParallel) else nullcontext()
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

    def _run_epoch(self, *args: Any, **kwargs: Any) -> None:
        # Resumed from a checkpoint of the last step, the Trainer would take one more.
        if self.ended or self.state.global_step >= self.state.max_steps:
            self.control.should_training_stop = True
            return
        super()._run_epoch(*args, **kwargs)

    def _save_checkpoint(self, model: torch.nn.Module, trial: Any) -> None:
        """Save a checkpoint atomically, and remove older ones only afterwards.

        Raises:
            RunError: it cannot be written and the run requires it; earlier checkpoints are kept.
        """
        self.store_flos()
        files = self.processes.gather(self._random_states())
        others = {name: content for each in files[1:] for name, content in each.items()}
        self.last_good, self.state.best_model_checkpoint = self.processes.share(lambda: self._write_checkpoint(others))

    def _random_states(self) -> dict[str, bytes]:
        """Return the files with this process's random states; only those of other processes than the first are sent."""
        if self.processes.first:
            return {}
        with TemporaryDirectory() as folder:
            self._save_rng_state(folder)
            return {path.name: path.read_bytes() for path in Path(folder).iterdir()}

    def _write_checkpoint(self, random_states: Mapping[str, bytes]) -> tuple[Path | None, str | None]:
        """Write a checkpoint in the first process.

        Returns:
            The last good checkpoint, and the best one.
        """
        run, step = self.run, self.state.global_step
        target = checkpoint_path(run, step)
        best, best_before = self.state.best_global_step, self.state.best_model_checkpoint
        if best and (best == step or checkpoint_path(run, best).is_dir()):
            self.state.best_model_checkpoint = str(checkpoint_path(run, best))
        try:
            with commit_directory(target) as folder:
                self.save_model(str(folder), _internal_call=True)
                self._save_optimizer_and_scheduler(str(folder))
                self._save_scaler(str(folder))
                self._save_rng_state(str(folder))
                for name, content in random_states.items():
                    (folder / name).write_bytes(content)
                states = cast(dict[str, Any], self.state.stateful_callbacks)  # since it is constructed
                for callback in (*self.callback_handler.callbacks, self.control):
                    if isinstance(callback, ExportableState):
                        states[type(callback).__name__] = callback.state()
                self.state.save_to_json(str(folder / TRAINER_STATE))
                atomic_write(folder / PROGRESS, json.dumps(self._in_progress(), indent=1) + "\n")
                seal(folder, step)
        except FoloraError:
            raise
        except Exception as error:  # a full disk raises OSError, RuntimeError or SafetensorError
            what = f"cannot save {target}: {first_line(error)}"
            if self.needs_saves or (self.args.load_best_model_at_end and best == step):
                raise RunError(what, "is the disk full? `--resume` continues from the previous checkpoint") from error
            self.state.best_model_checkpoint = best_before
            self.skipped.tell(f"{what}; training continues without it (training.on_save_error)")
            return self.last_good, best_before
        if self.skipped.in_a_row == 0:
            self.last_good = target
        needed = [self.last_good] if self.last_good is not None else []
        if self.args.load_best_model_at_end and self.state.best_model_checkpoint is not None:
            needed.append(Path(self.state.best_model_checkpoint))
        rotate(run, self.kept, needed)
        return self.last_good, self.state.best_model_checkpoint

    def _load_best_model(self) -> None:
        assert self.state.best_model_checkpoint is not None  # the Trainer checks this first
        best = Path(self.state.best_model_checkpoint)
        if problem := damage(best):
            raise RunError(
                f"the best checkpoint, {best.name}, is incomplete: {problem}",
                "`--resume` falls back to an earlier checkpoint, or to the start of training",
            )
        super()._load_best_model()

    def _in_progress(self) -> dict[str, Any]:
        """Return the state between two steps, the Trainer's and ours, that no other file holds."""
        return {
            "loss_sum": self._tr_loss.item(),
            "loss_total": self._total_loss_scalar,
            "last_logged": self._globalstep_last_logged,
            "ended": bool(self.control.should_training_stop and self.state.global_step < self.state.max_steps),
            "exceeded": self.exceeded,
            "skipped": [self.skipped.in_a_row, self.skipped.total],
            "losses": [self.skipped.first, self.skipped.last],
            "rows_that_fit": [self.micro_batches.splitter.rows, self.measuring.rows],
            "compiled": self.kernels.compiled is not None,
            "tokens": self._total_train_tokens,
            "metrics": {kind: dict(values) for kind, values in self._metrics.items()},
        }

    def _bring_back(self, checkpoint: Path, saved: SavedProgress) -> None:
        self._tr_loss.fill_(saved.loss_sum)
        self._total_loss_scalar, self._globalstep_last_logged = saved.loss_total, saved.last_logged
        self.ended, self.exceeded = saved.ended, saved.exceeded
        self.skipped.in_a_row, self.skipped.total = saved.skipped
        self.skipped.first, self.skipped.last = saved.losses
        self.micro_batches.splitter.rows, self.measuring.rows = saved.rows_that_fit
        self._total_train_tokens = saved.tokens
        self._metrics = {kind: defaultdict(list, saved.metrics.get(kind, {})) for kind in ("train", "eval")}
        self.last_good = checkpoint if self.skipped.in_a_row == 0 else None
        # The run folder may have been moved, or be named by another path.
        run, best = checkpoint.parent, self.state.best_global_step
        self.state.best_model_checkpoint = None
        if best and (best == step_of(checkpoint) or checkpoint_path(run, best).is_dir()):
            self.state.best_model_checkpoint = str(checkpoint_path(run, best))
