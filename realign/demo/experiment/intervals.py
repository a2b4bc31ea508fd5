"""Intervals: over training seeds by Student's t, and over the images of one seed by a paired
bootstrap. The two are never pooled.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import NamedTuple

import numpy as np

from realign.demo.experiment.scores import ModelAnswers, scores


class Interval(NamedTuple):
    """A mean with the ends of its interval."""

    mean: float
    low: float
    high: float


def t_interval(values: Sequence[float], level: float = 0.95) -> Interval:
    """Return the mean of values, one a training seed, with its t-interval.

    A single value has no interval: its ends are infinite. Values that are not a number make all
    three so.

    Args:
        values: Such as differences that are paired by seed.
        level: How often such intervals hold the true mean.
    """
    count = len(values)
    mean = math.fsum(values) / count
    if count == 1:
        return Interval(mean, -math.inf, math.inf)
    spread = math.sqrt(math.fsum((value - mean) ** 2 for value in values) / (count - 1))
    half = t_quantile(0.5 + level / 2, count - 1) * spread / math.sqrt(count)
    return Interval(mean, mean - half, mean + half)


def t_quantile(chance: float, freedom: int) -> float:
    """Return the quantile of Student's t, found by bisection.

    Args:
        chance: In [0.5, 1).
        freedom: Degrees of freedom, at least 1.
    """
    low, high = 0.0, 1.0
    while t_distribution(high, freedom) < chance:
        high *= 2
    for _ in range(200):
        middle = (low + high) / 2
        if t_distribution(middle, freedom) < chance:
            low = middle
        else:
            high = middle
    return (low + high) / 2


def t_distribution(value: float, freedom: int) -> float:
    """Return the chance that Student's t is at most ``value``, by the finite sums for whole degrees
    of freedom (Abramowitz and Stegun 1964, 26.7.3 and 26.7.4).
    """
    angle = math.atan(value / math.sqrt(freedom))
    sine, cosine = math.sin(angle), math.cos(angle)
    is_odd = freedom % 2 == 1
    terms = [cosine if is_odd else 1.0][: freedom // 2]
    for step in range(1, freedom // 2):
        factor = 2 * step / (2 * step + 1) if is_odd else (2 * step - 1) / (2 * step)
        terms.append(terms[-1] * factor * cosine**2)
    total = math.fsum(terms)
    inside = 2 / math.pi * (angle + sine * total) if is_odd else sine * total
    return 0.5 + inside / 2


def image_intervals(
    better: ModelAnswers,
    than: ModelAnswers,
    measures: Sequence[str],
    *,
    resamples: int,
    seed: int = 0,
) -> dict[str, Interval | None]:
    """Return the differences of measures between two models of one training seed, with their 95 %
    intervals over images, which are drawn for both alike; None where no draw defines one.

    Args:
        better: The answers of one model.
        than: The answers of the other about the same images.
        measures: Keys of what :func:`realign.demo.experiment.scores.scores` returns.
        resamples: Draws.
        seed: Of the draws.
    """
    rng = np.random.default_rng(seed)
    draws = np.empty((resamples, len(measures)))
    for row in draws:
        weights = {
            name: rng.multinomial(len(counts), np.full(len(counts), 1 / len(counts))).astype(float)
            for name, counts in better.counts.items()
        }
        of_better, of_than = scores(better, weights), scores(than, weights)
        row[:] = [of_better[measure] - of_than[measure] for measure in measures]
    points = scores(better), scores(than)
    found: dict[str, Interval | None] = {}
    for measure, values in zip(measures, draws.T, strict=True):
        defined = values[~np.isnan(values)]
        found[measure] = None
        if defined.size:
            low, high = np.percentile(defined, [2.5, 97.5]).tolist()
            found[measure] = Interval(points[0][measure] - points[1][measure], low, high)
    return found
