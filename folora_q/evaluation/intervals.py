"""Compute 95 % confidence intervals of means over few texts or answers.

Texts are the units, not tokens, which depend on each other within a text. The percentile bootstrap, which is common,
contains the truth in 87 % instead of 95 % of cases for 16 texts with a skewed KL; bootstrap-t contains it in 93 %.
tests/evaluation/intervals_test.py simulates the coverage of both functions.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from statistics import NormalDist

import numpy as np

from folora_q.recipe.size_advice import MIN_TEXTS
from folora_q.runs.results import Interval, PairedChange

RESAMPLES = 2000
# Resamples drawn at a time: 100 of 10,000 texts are 8 MB.
BLOCK = 100
TAIL = 0.025  # of a 95 % interval


@dataclass(frozen=True)
class Tally:
    """Sums over the tokens of each text, and their number; both (n,) float64."""

    sums: np.ndarray
    counts: np.ndarray

    @property
    def mean(self) -> float:
        """The mean over all tokens, not over texts."""
        return float(self.sums.sum() / self.counts.sum())


def estimate(tally: Tally, limits: tuple[float, float] = (-math.inf, math.inf), seed: int = 0) -> Interval:
    """Return the mean over all tokens with its bootstrap-t interval over texts; none for fewer than MIN_TEXTS.

    Source: Efron and Tibshirani, An Introduction to the Bootstrap (1993), section 12.5.

    Args:
        limits: the smallest and the largest possible mean.
    """
    return _bootstrapped([(1, tally)], limits, seed)


def difference(first: Tally, second: Tally, seed: int = 0) -> Interval:
    """Return the mean of the first less that of the second, of independent texts; the interval is as in `estimate`."""
    return _bootstrapped([(1, first), (-1, second)], (-math.inf, math.inf), seed)


def _bootstrapped(parts: list[tuple[int, Tally]], limits: tuple[float, float], seed: int) -> Interval:
    """Return a sum of means, each with its sign, and its bootstrap-t interval; the texts of each mean are resampled."""
    value = sum(sign * tally.mean for sign, tally in parts)
    if min(len(tally.counts) for _, tally in parts) < MIN_TEXTS:
        return Interval(value)
    error = math.sqrt(sum(float(_means(tally, np.ones((1, len(tally.counts))))[1][0]) ** 2 for _, tally in parts))
    if error == 0:  # in each mean all texts have the same one
        return Interval(value, value, value)
    generator = np.random.default_rng(seed)
    ratios: list[np.ndarray] = []
    for _ in range(RESAMPLES // BLOCK):
        sums, squares = np.zeros(BLOCK), np.zeros(BLOCK)
        for sign, tally in parts:
            texts = len(tally.counts)
            drawn = generator.multinomial(texts, np.full(texts, 1 / texts), size=BLOCK)  # how often each text
            means, errors = _means(tally, drawn)
            sums, squares = sums + sign * means, squares + errors**2
        errors = np.sqrt(squares)
        ratios.append((sums - value)[errors > 0] / errors[errors > 0])
    low, high = np.quantile(np.concatenate(ratios), [TAIL, 1 - TAIL])
    return Interval(value, max(value - float(high) * error, limits[0]), min(value - float(low) * error, limits[1]))


def change(base: Tally, tuned: Tally) -> PairedChange:
    """Return both means, and the interval of their difference, in which variation between texts cancels.

    Args:
        base, tuned: on the same texts, with the same counts.
    """
    return PairedChange(
        base=estimate(base), tuned=estimate(tuned), change=estimate(Tally(tuned.sums - base.sums, base.counts))
    )


def score_change(base: np.ndarray, tuned: np.ndarray) -> PairedChange:
    """Return the mean scores of paired answers, and their difference, each with an adjusted Wald interval.

    Half an answer is added for each of the four pairs of scores 0 and 1, so that scores that are all alike do not give
    an interval of width zero. Source: Agresti and Min, Simple improved confidence intervals for comparing matched
    proportions, Statistics in Medicine 24 (2005).

    Args:
        base, tuned: scores between 0 and 1, (n,).
    """
    base, tuned = base.astype(np.float64), tuned.astype(np.float64)
    return PairedChange(
        base=_adjusted(base, [(0, 1.0), (1, 1.0)], 0),
        tuned=_adjusted(tuned, [(0, 1.0), (1, 1.0)], 0),
        change=_adjusted(tuned - base, [(-1, 0.5), (0, 1.0), (1, 0.5)], -1),
    )


def share(hits: np.ndarray) -> Interval:
    """Return a share of independent cases with its adjusted Wald interval: two hits and two misses are added.

    Source: Agresti and Coull, Approximate is better than "exact" for interval estimation of binomial proportions, The
    American Statistician 52 (1998).

    Args:
        hits: 0 or 1, (n,).
    """
    return _adjusted(hits.astype(np.float64), [(0, 2.0), (1, 2.0)], 0)


def _means(tally: Tally, drawn: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Return the mean of each resample and its standard error, of a ratio by linearization.

    Args:
        drawn: how often each resample has each text, (resamples, n).
    """
    texts = len(tally.counts)
    counts = drawn @ tally.counts
    means = (drawn @ tally.sums) / counts
    # Squared deviations of sums from mean x count; centred on the mean of all, so that they do not cancel.
    apart = tally.sums - tally.mean * tally.counts
    shift = means - tally.mean
    squares = drawn @ apart**2 - 2 * shift * (drawn @ (apart * tally.counts)) + shift**2 * (drawn @ tally.counts**2)
    squares = np.where(squares > 1e-12 * (drawn @ tally.sums**2), squares, 0.0)  # rounding is not variation
    return means, np.sqrt(squares * texts / (texts - 1)) / counts


def _adjusted(scores: np.ndarray, added: list[tuple[int, float]], least: int) -> Interval:
    """Return the mean score with a Wald interval that includes added scores and their weights."""
    count = len(scores)
    if count < MIN_TEXTS:
        return Interval(float(scores.mean()))
    weight = count + sum(share for _, share in added)
    mean = (scores.sum() + sum(value * share for value, share in added)) / weight
    square = ((scores**2).sum() + sum(value**2 * share for value, share in added)) / weight
    half = NormalDist().inv_cdf(1 - TAIL) * math.sqrt((square - mean**2) / weight)
    return Interval(float(scores.mean()), max(float(mean - half), least), min(float(mean + half), 1.0))
