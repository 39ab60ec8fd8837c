"""Compute confidence intervals of means over few texts, by bootstrapping texts."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from folora_q.runs.results import Interval, PairedChange

RESAMPLES = 2000
# Resamples drawn at a time: 100 of 10,000 texts are 8 MB.
BLOCK = 100
TAIL = 0.025  # of a 95 % interval


@dataclass(frozen=True)
class Tally:
    """Sums over the tokens of each text (or the score of each answer), and their number; both (n,) float64."""

    sums: np.ndarray
    counts: np.ndarray

    @property
    def mean(self) -> float:
        """The mean over all tokens, not over texts."""
        return float(self.sums.sum() / self.counts.sum())


def estimate(tally: Tally, seed: int = 0) -> Interval:
    """Return the mean with its percentile interval.

    Texts are resampled, not tokens, which depend on each other within a text; the mean is sum / count of a resample.
    Source: Efron and Tibshirani, An Introduction to the Bootstrap (1993), chapter 13.
    """
    return _interval(tally.mean, _means(tally, seed))


def change(base: Tally, tuned: Tally, seed: int = 0) -> PairedChange:
    """Return both means, and their difference on the same resamples, so that variation between texts cancels."""
    of_base, of_tuned = _means(base, seed), _means(tuned, seed)
    return PairedChange(
        base=_interval(base.mean, of_base),
        tuned=_interval(tuned.mean, of_tuned),
        change=_interval(tuned.mean - base.mean, of_tuned - of_base),
    )


def _means(tally: Tally, seed: int) -> np.ndarray:
    """Return means of RESAMPLES draws with replacement; the same draws for every tally of equal length."""
    texts = len(tally.counts)
    generator = np.random.default_rng(seed)
    means: list[np.ndarray] = []
    for _ in range(RESAMPLES // BLOCK):
        drawn = generator.multinomial(texts, np.full(texts, 1 / texts), size=BLOCK)  # how often each text
        means.append((drawn @ tally.sums) / (drawn @ tally.counts))
    return np.concatenate(means)


def _interval(value: float, means: np.ndarray) -> Interval:
    low, high = np.quantile(means, [TAIL, 1 - TAIL])
    return Interval(value, float(low), float(high))
