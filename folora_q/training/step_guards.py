"""Guards around a step: batch splitting, skipped steps, and the pre-flight check."""

from __future__ import annotations

import math
import shutil
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, cast

import pyarrow.compute as pc
from datasets import Dataset
from torch import Tensor

from folora_q.data.batch_splitting import BatchSplitter, ran_out, rows_of_inputs
from folora_q.errors import RunError
from folora_q.storage.files import free_bytes

Inputs = dict[str, Any]
# A checkpoint holds the adapter and, with Adam, two moments of its size.
CHECKPOINT_COPIES = 3
# The measure of a blow-up: so many losses, the first and the last ones; there are none before the least of them.
MEASURE, MIN_MEASURED_LOSSES = 32, 10


class MicroBatches:
    """The micro-batches of one optimizer step, computed again in halves where memory runs out.

    The loss of a part is a sum over its tokens, divided by the number of all tokens of the step, so that the parts add
    up to the whole. An error in the middle of a backward pass leaves half of a gradient: all that the step has gathered
    is cleared and computed again.
    """

    def __init__(self, splitter: BatchSplitter) -> None:
        self.splitter = splitter
        self.gathered: list[Inputs] = []

    def add(
        self, inputs: Inputs, first: bool, compute: Callable[[Inputs], Tensor], clear: Callable[[], None]
    ) -> Tensor:
        """Compute a micro-batch's loss and add its gradient.

        Args:
            inputs: tensors (rows, ...).
            first: it is the first of its step.
            compute: does one part.
            clear: puts the step's gradients back to nothing.

        Raises:
            RunError: memory runs out with one sequence.
        """
        if first:
            self.gathered.clear()
        self.gathered.append(inputs)
        todo = [inputs]
        while True:
            try:
                losses = [sum(compute(part) for part in self._parts(each)) for each in todo]
                return cast(Tensor, losses[-1])
            except RuntimeError as error:
                if not ran_out(error):
                    raise
            rows, length = inputs["input_ids"].shape
            clear()
            self.splitter.halve(self.splitter.fitting(rows), length)
            todo = self.gathered

    def _parts(self, inputs: Inputs) -> list[Inputs]:
        rows = len(inputs["input_ids"])
        size = self.splitter.fitting(rows)
        return (
            [inputs]
            if size >= rows
            else [rows_of_inputs(inputs, start, start + size) for start in range(0, rows, size)]
        )


class SkippedSteps:
    """Finds and counts optimizer steps to leave out: their loss or gradient is not finite, or the loss has blown up.

    A loss has blown up if it is over `factor` times the largest of the last ones (of the first, if those were less) and
    over half of what guessing every token alike costs, which one hard example in an easy task is not.

    Args:
        most: so many in a row end the run.
        factor: of a blow-up; None looks for none.
        vocabulary: how many tokens there are; guessing costs its logarithm.
        tell: takes one line for each.
        record: takes one line of metrics for each.
    """

    def __init__(
        self,
        most: int,
        factor: float | None = None,
        vocabulary: int = 1,
        tell: Callable[[str], None] = lambda line: None,
        record: Callable[[dict[str, Any]], None] = lambda line: None,
    ) -> None:
        self.most, self.factor, self.tell, self.record = most, factor, tell, record
        self.least = math.log(vocabulary) / 2
        self.in_a_row = self.total = 0
        self.first: list[float] = []
        self.last: list[float] = []

    def reason(self, loss: float, norm: float) -> str | None:
        """Why to leave a step out, as the end of a sentence that begins with its loss; None to take it."""
        if not math.isfinite(loss + norm):
            return "not finite"
        if self.factor is None or len(self.first) < MIN_MEASURED_LOSSES:
            return None
        bound = max(self.factor * min(max(self.first), max(self.last)), self.least)
        return f"over {bound:.4g}, training.max_loss_factor" if loss > bound else None

    def taken(self, loss: float) -> None:
        """A step was not left out."""
        self.in_a_row = 0
        if len(self.first) < MEASURE:
            self.first.append(loss)
        self.last = [*self.last, loss][-MEASURE:]

    def add(self, step: int, loss: float, norm: float, reason: str, last_good: Path | None) -> None:
        """One more was left out; `record` gets its line of metrics.

        Args:
            last_good: the checkpoint to go back to, for the error.

        Raises:
            RunError: it is the last one in a row that is allowed.
        """
        self.in_a_row += 1
        self.total += 1
        what = f"loss {loss:.4g}, gradient norm {norm:.4g}: {reason}"
        self.record({"step": step, "skipped": what})
        self.tell(f"step {step} skipped: {what} ({self.in_a_row} in a row, the run ends at {self.most})")
        if self.in_a_row >= self.most:
            kept = f"; {last_good.name} is the last good checkpoint" if last_good is not None else ""
            raise RunError(
                f"{self.most} steps in a row could not be taken, the last of them step {step} ({what}){kept}",
                "lower training.learning_rate",
            )


def longest_rows(dataset: Dataset, count: int) -> list[dict[str, Any]]:
    """The rows that take the most memory."""
    column = dataset.with_format("arrow").select_columns(["input_ids"])[:]["input_ids"]
    lengths = pc.call_function("list_value_length", [column]).to_pylist()
    order = sorted(range(len(lengths)), key=lambda index: -lengths[index])
    return [dataset[index] for index in order[:count]]


def rehearse_saving(save: Callable[[str], None], folder: Path, parameters: Sequence[Tensor], kept: int) -> None:
    """Save what a checkpoint holds once, and remove it again.

    Args:
        save: writes the adapter to a folder.
        kept: how many checkpoints will be kept; 0 for one that is removed in the end.

    Raises:
        RunError: the folder cannot be written, or the disk has no room for the checkpoints.
    """
    target = folder / ".rehearsal"
    try:
        save(str(target))
    except Exception as error:  # safetensors raises its own for a full disk
        raise RunError(f"cannot save a checkpoint in {folder}: {error}", "is the disk full or read-only?") from error
    finally:
        shutil.rmtree(target, ignore_errors=True)
    size = sum(parameter.numel() * parameter.element_size() for parameter in parameters)
    needed, free = size * (1 + CHECKPOINT_COPIES * (kept + 1)), free_bytes(folder)
    if free < needed:
        raise RunError(
            f"the checkpoints of this run need {needed / 1e9:.1f} GB in {folder}, and {free / 1e9:.1f} GB are free",
            "lower training.save_total_limit, or name another training.output_dir",
        )
