"""Guards around a step: batch splitting, skipped steps, and the pre-flight check."""

from __future__ import annotations

import math
import shutil
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any, cast

import pyarrow.compute as pc
from datasets import Dataset
from torch import Tensor

from folora_q.data.batch_splitting import BatchSplitter, ran_out, rows_of_inputs
from folora_q.data.pairs import columns_of
from folora_q.errors import RunError
from folora_q.kernels.compiled_layers import CompilationError
from folora_q.storage.files import free_bytes

Inputs = dict[str, Any]
# A checkpoint holds the adapter and, with Adam, two moments of its size.
CHECKPOINT_COPIES = 3
# Losses to detect a loss spike by: the first and the last of a run; with fewer than the minimum, none is detected.
MEASURE, MIN_MEASURED_LOSSES = 32, 10


class MicroBatches:
    """The micro-batches of one optimizer step; recomputed in parts if memory runs out, or without compiled layers.

    The loss of a part is a sum over its tokens, or rows, divided by their number in the complete step, so that the
    parts add up. An error during a backward pass leaves a partial gradient: the step's gradients are then cleared, and
    all its micro-batches recomputed.

    Args:
        stop_compiling: lets layers run as they are, since they could not be compiled.
    """

    def __init__(self, splitter: BatchSplitter, stop_compiling: Callable[[CompilationError], None]) -> None:
        self.splitter, self.stop_compiling = splitter, stop_compiling
        self.gathered: list[Inputs] = []

    def add(
        self, inputs: Inputs, first: bool, compute: Callable[[Inputs, bool], Tensor], clear: Callable[[], None]
    ) -> Tensor:
        """Compute a micro-batch's loss and add its gradient.

        Args:
            inputs: tensors (rows, ..., t) or (rows,).
            first: whether it is the first of its step.
            compute: forward and backward of one part; is told whether more parts of the micro-batch follow.
            clear: clears the step's gradients.

        Raises:
            RunError: a single sequence does not fit into memory.
        """
        if first:
            self.gathered.clear()
        self.gathered.append(inputs)
        todo = [inputs]
        while True:
            try:
                losses = [sum(self._losses(each, compute)) for each in todo]
                return cast(Tensor, losses[-1])
            except CompilationError as error:
                self.stop_compiling(error)
                out_of_memory = False
            except RuntimeError as error:
                if not (out_of_memory := ran_out(error)):
                    raise
            clear()  # here, where the error no longer holds the tensors of its frames
            if out_of_memory:
                rows, length = len(inputs["input_ids"]), inputs["input_ids"].shape[-1]
                self.splitter.halve(self.splitter.fitting(rows), length)
            todo = self.gathered

    def _losses(self, inputs: Inputs, compute: Callable[[Inputs, bool], Tensor]) -> Iterator[Tensor]:
        parts = self._parts(inputs)
        for number, part in enumerate(parts, 1):
            yield compute(part, number < len(parts))

    def _parts(self, inputs: Inputs) -> list[Inputs]:
        rows = len(inputs["input_ids"])
        size = self.splitter.fitting(rows)
        return (
            [inputs]
            if size >= rows
            else [rows_of_inputs(inputs, start, start + size) for start in range(0, rows, size)]
        )


class SkippedSteps:
    """Detects and counts optimizer steps to skip: non-finite loss or gradient, or a loss spike.

    A loss spike exceeds `factor` times the largest of the recent losses (or of the first losses, if that is lower), and
    half the loss of a uniform guess, so that one hard example in an easy task does not count.

    Args:
        most: number of skipped steps in a row that ends the run.
        factor: threshold of a loss spike; None disables the detection.
        vocabulary: number of tokens; a uniform guess has the loss log(vocabulary).
        tell: receives a line for each skipped step.
        record: receives a line of metrics for each skipped step.
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
        """Return why to skip a step, as the end of a sentence that begins with its loss; None to take it."""
        if not math.isfinite(loss + norm):
            return "not finite"
        if self.factor is None or len(self.first) < MIN_MEASURED_LOSSES:
            return None
        bound = max(self.factor * min(max(self.first), max(self.last)), self.least)
        return f"over {bound:.4g}, training.max_loss_factor" if loss > bound else None

    def taken(self, loss: float) -> None:
        """Record the loss of a step that was taken."""
        self.in_a_row = 0
        if len(self.first) < MEASURE:
            self.first.append(loss)
        self.last = [*self.last, loss][-MEASURE:]

    def add(self, step: int, loss: float, norm: float, reason: str, last_good: Path | None) -> None:
        """Count a skipped step, and report it.

        Args:
            last_good: the checkpoint that the error names.

        Raises:
            RunError: the number of skipped steps in a row reached its limit.
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
    """Return the rows with the longest sequences that are trained on, which take the most memory."""
    names = [ids for ids, _ in columns_of(dataset.column_names, trained=True)]
    table = dataset.with_format("arrow").select_columns(names)[:]
    of_columns = [pc.call_function("list_value_length", [table[name]]).to_pylist() for name in names]
    lengths = list(map(max, zip(*of_columns, strict=True)))
    order = sorted(range(len(lengths)), key=lambda index: -lengths[index])
    return [dataset[index] for index in order[:count]]


def rehearse_saving(save: Callable[[str], None], folder: Path, parameters: Sequence[Tensor], kept: int) -> None:
    """Save the adapter as a trial, remove it, and check the disk space for the checkpoints.

    Args:
        save: writes the adapter to a folder.
        kept: number of checkpoints to keep; 0 for a single one that is removed at the end.

    Raises:
        RunError: the folder cannot be written, or the disk space does not suffice.
    """
    target = folder / ".rehearsal"
    try:
        save(str(target))
    except Exception as error:  # for a full disk safetensors raises its own
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
