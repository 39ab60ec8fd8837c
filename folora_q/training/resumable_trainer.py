"""A trainer whose checkpoints are complete or absent, and from which training resumes exactly.

It overrides single steps of the Trainer, of transformers 5.17 to 5.23; the training loop is the Trainer's own.
"""

from __future__ import annotations

import json
from collections import defaultdict
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from pickle import UnpicklingError
from tempfile import TemporaryDirectory
from typing import Any, cast

import torch
from datasets import Dataset
from peft import PeftModel
from safetensors import SafetensorError
from transformers.trainer_callback import ExportableState
from trl import SFTConfig, SFTTrainer

from folora_q.data.batch_splitting import BatchSplitter
from folora_q.distributed.processes import ONE, Processes
from folora_q.errors import FoloraError, RunError, first_line
from folora_q.kernels.step_kernels import StepKernels
from folora_q.storage.files import atomic_write, commit_directory
from folora_q.training.budget import Budget
from folora_q.training.checkpoint_schema import PROGRESS, TRAINER_STATE, SavedProgress, SavedState, read_saved
from folora_q.training.checkpoints import checkpoint_path, damage, rotate, seal, step_of
from folora_q.training.step_guards import MicroBatches, SkippedSteps

# Private members of transformers' and TRL's trainers that this subclass overrides or relies on (5.17 to 5.23). A test
# looks for each in the installed versions, so that an upgrade which renames one fails there and not in a run.
OVERRIDDEN = ("_get_grad_norm", "_get_num_items_in_batch", "_run_epoch", "_save_checkpoint", "_load_best_model")
RELIED_ON = (
    *("_tr_loss", "_total_loss_scalar", "_globalstep_last_logged", "_total_train_tokens", "_metrics"),
    *("_save_optimizer_and_scheduler", "_save_scaler", "_save_rng_state", "_prepare_inputs"),
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


class ResumableTrainer(SFTTrainer):
    """A trainer that saves all its state between two steps, and restores it.

    Args:
        tolerance: how it reacts to faults.

    Attributes:
        budget: of what may be forgotten, if the recipe has one.
        exceeded: the step and the KL at which training stopped because the KL exceeded its limit.
        last_good: the last checkpoint that was not written while steps were skipped.
        continued: the checkpoint that training resumed from.
        ended: training stopped early before that checkpoint.
    """

    model: PeftModel
    args: SFTConfig
    train_dataset: Dataset

    def __init__(self, *args: Any, tolerance: FaultTolerance, **kwargs: Any) -> None:
        self.micro_batches, self.measuring = tolerance.micro_batches, tolerance.measuring
        self.skipped, self.kept, self.needs_saves = tolerance.skipped, tolerance.kept, tolerance.needs_saves
        self.kernels, self.processes = tolerance.kernels, tolerance.processes
        self.budget: Budget | None = None
        self.exceeded: tuple[int, float] | None = None
        self.last_good: Path | None = None
        self.continued: Path | None = None
        self.ended = False
        super().__init__(*args, **kwargs)

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
            "budget": None if self.budget is None else self.budget.state.to_dict(),
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
        if self.budget is not None and saved.budget is not None:
            self.budget.state = saved.budget
        self._metrics = {kind: defaultdict(list, saved.metrics.get(kind, {})) for kind in ("train", "eval")}
        self.last_good = checkpoint if self.skipped.in_a_row == 0 else None
        # The run folder may have been moved, or be named by another path.
        run, best = checkpoint.parent, self.state.best_global_step
        self.state.best_model_checkpoint = None
        if best and (best == step_of(checkpoint) or checkpoint_path(run, best).is_dir()):
            self.state.best_model_checkpoint = str(checkpoint_path(run, best))
