"""Half as many where memory runs out: every row once, in order, and never twice."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from folora_q.data.batch_splitting import BatchSplitter, first_rows, ran_out, rows_of
from folora_q.data.tokens import IGNORED, batches
from folora_q.errors import RunError


@settings(deadline=None, max_examples=15)  # a halving collects garbage, which takes a while in a large process
@given(count=st.integers(1, 20), fits=st.integers(1, 20), most=st.none() | st.integers(1, 20))
def test_every_row_is_computed_once_in_order(count: int, fits: int, most: int | None) -> None:
    told: list[str] = []
    splitter = BatchSplitter("testing", told.append)
    seen: list[int] = []

    def compute(start: int, stop: int) -> int:
        if stop - start > fits:
            raise RuntimeError("CUDA out of memory. Tried to allocate 2 GiB")
        seen.extend(range(start, stop))
        return stop - start

    sizes = list(splitter.over(count, 7, compute, most))
    assert seen == list(range(count))
    assert sum(sizes) == count and max(sizes) <= min(fits, most or count)
    assert bool(told) == (min(count, most or count) > fits)
    told.clear()
    list(splitter.over(count, 7, compute, most))
    assert not told, "it remembers what fits"


def test_one_row_that_does_not_fit_is_a_sentence_and_other_errors_pass() -> None:
    def never(start: int, stop: int) -> None:
        raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2 GiB")

    with pytest.raises(RunError, match="memory ran out while testing, with 1 sequences of 7 tokens"):
        list(BatchSplitter("testing").over(4, 7, never))
    with pytest.raises(RunError, match="with 4 sequences"):
        list(BatchSplitter("testing", enabled=False).over(4, 7, never))

    def wrong(start: int, stop: int) -> None:
        raise RuntimeError("shapes do not match")

    with pytest.raises(RuntimeError, match="shapes"):
        list(BatchSplitter("testing").over(4, 7, wrong))


def test_what_counts_as_full_memory() -> None:
    assert ran_out(torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2 GiB"))
    assert ran_out(RuntimeError("[enforce fail] DefaultCPUAllocator: can't allocate memory: you tried"))
    assert ran_out(MemoryError())
    assert not ran_out(RuntimeError("shapes do not match"))
    assert not ran_out(KeyError("CUDA out of memory."))


def test_parts_of_a_batch_lose_the_padding_that_only_others_needed() -> None:
    [batch] = batches([[1, 2, 3, 4], [5, 6], [7]], 3, torch.device("cpu"), [[1, 2, 3, 4], [IGNORED, 6], [7]])
    part = rows_of(batch, 1, 3)
    assert part.input_ids.tolist() == [[5, 6], [7, 0]]
    assert part.labels.tolist() == [[IGNORED, 6], [7, IGNORED]]
    assert rows_of(batch, 0, 3) is batch
    assert [len(part.input_ids) for part in first_rows([batch, batch, batch], 5)] == [3, 2]
    assert first_rows([batch], 9) == [batch] and first_rows([batch], 0) == []
