"""Intervals against arithmetic, and against how often they contain the truth."""

from __future__ import annotations

import math

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy.stats import bootstrap

from folora_q.evaluation.intervals import Tally, change, difference, estimate, score_change, share
from folora_q.recipe.size_advice import MIN_TEXTS
from folora_q.runs.results import Interval

texts = st.lists(st.tuples(st.floats(-100, 100), st.integers(1, 50)), min_size=MIN_TEXTS, max_size=20)


def tally(pairs: list[tuple[float, int]]) -> Tally:
    sums, counts = zip(*pairs, strict=True)
    return Tally(np.array(sums, dtype=np.float64), np.array(counts, dtype=np.float64))


@settings(deadline=None, max_examples=40)
@given(texts)
def test_the_mean_is_over_tokens_and_inside_its_interval(pairs: list) -> None:
    found = estimate(tally(pairs))
    assert found.value == pytest.approx(sum(t for t, _ in pairs) / sum(c for _, c in pairs))
    assert found.low <= found.value + 1e-9 and found.value - 1e-9 <= found.high
    assert estimate(tally(pairs)) == found  # the resamples are the same each time


@settings(deadline=None, max_examples=40)
@given(texts, st.floats(-5, 5))
def test_what_every_text_gains_alike_is_certain_however_much_they_differ(pairs: list, gain: float) -> None:
    before = tally(pairs)
    found = change(before, Tally(before.sums + gain * before.counts, before.counts))
    assert found.change.value == pytest.approx(gain, abs=1e-6)
    assert found.change.high - found.change.low < 1e-6
    assert found.base == estimate(before)


def test_with_equal_counts_it_is_close_to_what_scipy_computes_by_another_method() -> None:
    sums = np.random.default_rng(0).normal(2.0, 1.0, size=400)
    found = estimate(Tally(sums, np.ones(400)))
    expected = bootstrap((sums,), np.mean, method="BCa", rng=np.random.default_rng(0)).confidence_interval
    assert (found.low, found.high) == pytest.approx((expected.low, expected.high), abs=0.02)


def test_a_difference_of_independent_means_has_an_interval_of_both() -> None:
    generator = np.random.default_rng(0)
    first, second = (Tally(generator.normal(mean, 1.0, 300), np.ones(300)) for mean in (2.0, 1.0))
    found, single = difference(first, second), estimate(first)
    assert found.value == pytest.approx(first.mean - second.mean)
    assert found.high - found.low == pytest.approx(math.sqrt(2) * (single.high - single.low), rel=0.1)
    few = Tally(np.arange(MIN_TEXTS - 1.0), np.ones(MIN_TEXTS - 1))
    assert difference(first, few).bounds is None and difference(few, first).bounds is None


def test_few_texts_have_no_interval() -> None:
    few, enough = np.arange(MIN_TEXTS - 1.0), np.arange(float(MIN_TEXTS))
    assert estimate(Tally(few, np.ones_like(few))) == Interval(few.mean(), None, None)
    assert estimate(Tally(enough, np.ones_like(enough))).bounds is not None
    assert score_change(few > 3, few > 2).change.bounds is None


def coverage(draw, truth: float, intervals) -> float:
    """The share of 400 samples whose interval contains the truth."""
    generator = np.random.default_rng(1)
    found = [intervals(draw(generator)).bounds for _ in range(400)]
    return sum(low <= truth <= high for low, high in found) / len(found)


def per_text(means: np.ndarray, generator: np.random.Generator) -> Tally:
    """Texts of different lengths, with these mean values."""
    counts = generator.integers(20, 97, size=len(means)).astype(np.float64)
    return Tally(means * counts, counts)


@pytest.mark.parametrize("texts", [16, 32])
@pytest.mark.parametrize(
    ("sample", "truth"),
    [
        pytest.param(lambda g, n: g.normal(0.0, 0.02, n), 0.0, id="change of a loss"),
        pytest.param(lambda g, n: g.lognormal(0.0, 0.8, n), math.exp(0.32), id="KL, which is skewed"),
    ],
)
def test_intervals_contain_the_truth_about_as_often_as_they_say(sample, truth: float, texts: int) -> None:
    assert 0.90 < coverage(lambda g: per_text(sample(g, texts), g), truth, estimate) < 0.98


def test_intervals_of_a_difference_contain_the_truth_about_as_often_as_they_say() -> None:
    def both(g: np.random.Generator) -> tuple[Tally, Tally]:
        return Tally(g.normal(1.0, 1.0, 16), np.ones(16)), Tally(g.normal(0.0, 3.0, 24), np.ones(24))

    assert 0.90 < coverage(both, 1.0, lambda parts: difference(*parts)) < 0.98


@pytest.mark.parametrize("answers", [16, 32])
@pytest.mark.parametrize(("gained", "lost"), [(0.35, 0.05), (0.1, 0.05), (0.0, 0.05), (0.6, 0.0)])
def test_intervals_of_changed_scores_contain_the_truth(gained: float, lost: float, answers: int) -> None:
    def draw(generator: np.random.Generator) -> np.ndarray:
        # Both models right at a third of the other prompts.
        return generator.choice([0, 1, 2, 3], answers, p=[gained, lost, (rest := 1 - gained - lost) / 3, rest * 2 / 3])

    def interval(kinds: np.ndarray) -> Interval:
        return score_change(np.isin(kinds, (1, 2)), np.isin(kinds, (0, 2))).change

    assert coverage(draw, gained - lost, interval) >= 0.92


def test_scores_that_are_all_alike_are_not_certain() -> None:
    found = score_change(np.zeros(16), np.ones(16))
    assert found.base.value == 0.0 and found.base.low == 0.0 and 0.1 < found.base.high < 0.3
    assert found.change.value == 1.0 and found.change.high == 1.0 and 0.6 < found.change.low < 0.9


@pytest.mark.parametrize(("count", "truth"), [(12, 0.9), (48, 0.97), (48, 0.6), (200, 0.99)])
def test_the_interval_of_a_share_contains_the_truth(count: int, truth: float) -> None:
    generator = np.random.default_rng(0)
    found = [share(generator.random(count) < truth) for _ in range(2000)]
    covered = np.mean([each.low <= truth <= each.high for each in found])
    assert 0.93 <= covered <= 1
    assert all(0 <= each.low <= each.value <= each.high <= 1 for each in found)
