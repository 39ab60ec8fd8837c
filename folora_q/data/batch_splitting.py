"""Split batches in half when memory runs out; results stay the same."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any, TypeVar

from accelerate.utils.memory import clear_device_cache, should_reduce_batch_size
from torch import Tensor

from folora_q.data.tokens import Batch
from folora_q.errors import RunError

Result = TypeVar("Result")
# With fewer, the processes' shares of a text can differ by a quarter.
BATCHES_PER_PROCESS = 4


class BatchSplitter:
    """Splits batches in half when memory runs out, and remembers how many sequences fit.

    Args:
        what: the work, as notes and errors name it.
        tell: receives one line each time that batches are split.
        enabled: if False, running out of memory is an error at once.
    """

    def __init__(self, what: str, tell: Callable[[str], None] = lambda line: None, enabled: bool = True) -> None:
        self.what, self.tell, self.enabled = what, tell, enabled
        self.rows: int | None = None

    def fitting(self, rows: int) -> int:
        """Return how many of `rows` sequences to compute at a time."""
        return rows if self.rows is None else min(rows, self.rows)

    def over(
        self, count: int, length: int, compute: Callable[[int, int], Result], most: int | None = None
    ) -> Iterator[Result]:
        """Yield `compute(start, stop)` for consecutive spans of `count` sequences.

        Args:
            length: tokens per sequence, for the error.
            compute: must have no side effects when it fails.
            most: the maximum number of sequences at a time; None: all.

        Raises:
            RunError: memory runs out with a single sequence.
        """
        start = 0
        while start < count:
            stop = min(count, start + self.fitting(most or count))
            try:
                result = compute(start, stop)
            except (RuntimeError, MemoryError) as error:
                if not ran_out(error):
                    raise
            else:
                start = stop
                yield result
                continue
            self.halve(stop - start, length)  # outside the except block, whose traceback keeps what did not fit

    def over_batch(self, batch: Batch, compute: Callable[[Batch], Result]) -> Iterator[Result]:
        """Yield `compute(part)` for parts of a batch, in order; see `over`."""
        rows, length = batch.input_ids.shape
        return self.over(rows, length, lambda start, stop: compute(rows_of(batch, start, stop)))

    def halve(self, rows: int, length: int) -> None:
        """Halve the number of sequences at a time, after memory ran out with `rows` sequences of `length` tokens.

        Raises:
            RunError: it was a single sequence, or splitting is disabled.
        """
        clear_device_cache(garbage_collection=True)
        if rows == 1 or not self.enabled:
            raise RunError(
                f"memory ran out while {self.what}, with {rows} sequences of {length} tokens",
                "free memory that other programs use, lower training.max_length or the batch size, or set "
                "training.auto_batch_size: true",
            )
        self.rows = (rows + 1) // 2
        self.tell(f"memory ran out while {self.what} {rows} sequences at a time; continuing with {self.rows}")


def ran_out(error: BaseException) -> bool:
    """Return whether an error means that device or host memory is full."""
    return isinstance(error, MemoryError) or (isinstance(error, Exception) and should_reduce_batch_size(error))


def rows_of(batch: Batch, start: int, stop: int) -> Batch:
    """Return a slice of a batch, without padding that only the other sequences needed."""
    if start == 0 and stop >= len(batch.input_ids):
        return batch
    return Batch(**rows_of_inputs(batch._asdict(), start, stop))


def divided(text: Sequence[Batch], processes: int) -> Sequence[Batch]:
    """Return the same rows in more batches, if there are too few for every process to get about as many."""
    if processes == 1 or len(text) >= BATCHES_PER_PROCESS * processes:
        return text
    sizes = [-(-len(batch.input_ids) // processes) for batch in text]
    return [
        rows_of(batch, start, start + size)
        for batch, size in zip(text, sizes, strict=True)
        for start in range(0, len(batch.input_ids), size)
    ]


def first_rows(text: Sequence[Batch], count: int) -> list[Batch]:
    """Return the first `count` sequences of a text, in the batches that they are in."""
    found: list[Batch] = []
    for batch in text:
        if count <= 0:
            break
        found.append(rows_of(batch, 0, count))
        count -= len(batch.input_ids)
    return found


def rows_of_inputs(inputs: Mapping[str, Any], start: int, stop: int) -> dict[str, Any]:
    """Slice inputs (rows, ..., t) or (rows,) as `rows_of` does; without an attention mask, padding is kept."""
    part = {name: value[start:stop] if isinstance(value, Tensor) else value for name, value in inputs.items()}
    mask = part.get("attention_mask")
    if mask is None:
        return part
    width = int(mask.sum(-1).max())
    padded = {name: value for name, value in part.items() if isinstance(value, Tensor) and value.dim() > 1}
    return part | {name: value[..., :width] for name, value in padded.items()}
