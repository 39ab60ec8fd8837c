"""Intervals against arithmetic, and against how often they hold the truth."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from folora_q.evaluation.bootstrap import Tally, change, estimate

texts = st.lists(st.tuples(st.floats(-100, 100), st.integers(1, 50)), min_size=1, max_size=20)


def tally(pairs: list[tuple[float, int]]) -> Tally:
    sums, counts = zip(*pairs, strict=True)
    return Tally(np.array(sums, dtype=np.float64), np.array(counts, dtype=np.float64))


@settings(deadline=None, max_examples=40)
@given(texts)
def test_an_interval_lies_between_the_extreme_texts_and_holds_what_is_certain(pairs: list) -> None:
    found = estimate(tally(pairs))
    means = [total / count for total, count in pairs]
    assert found.value == pytest.approx(sum(t for t, _ in pairs) / sum(c for _, c in pairs))
    assert min(means) - 1e-9 <= found.low <= found.high <= max(means) + 1e-9
    if len(pairs) == 1:
        assert found.low == pytest.approx(found.high) == pytest.approx(found.value)


@settings(deadline=None, max_examples=40)
@given(texts, st.floats(-5, 5))
def test_what_every_text_gains_alike_is_certain_however_much_they_differ(pairs: list, gain: float) -> None:
    before = tally(pairs)
    found = change(before, Tally(before.sums + gain * before.counts, before.counts))
    assert found.change.value == pytest.approx(gain, abs=1e-6)
    assert found.change.high - found.change.low < 1e-6
    assert found.base == estimate(before)


def test_95_of_100_intervals_hold_the_truth() -> None:
    generator = np.random.default_rng(0)
    held = 0
    for _ in range(400):
        counts = generator.integers(5, 50, size=40)
        found = estimate(Tally(generator.normal(2.0, 1.0, size=40) * counts, counts.astype(np.float64)))
        held += found.low <= 2.0 <= found.high
    assert 0.90 < held / 400 < 0.98
