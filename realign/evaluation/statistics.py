"""Draws of clusters for the bootstrap, and for the permutation test that exchanges two models.

Questions about one image are not independent, so whole clusters are drawn. The weights of one draw
apply to all splits, tasks, rules and models of a benchmark, so that differences and means over
splits have valid intervals too.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import NamedTuple

import numpy as np
from numpy.typing import ArrayLike

from realign.evaluation.benchmark import Array, Metrics

NUMBERS_AT_ONCE = 1_000_000  # in a block of weights, which takes 8 MB


class Draws(NamedTuple):
    """The number of draws of clusters, and their seed."""

    number: int
    seed: int = 0

    def weights(self, clusters: int) -> Iterator[Array]:
        """Yield blocks of weights, shape ``(draws, clusters)``: how often each cluster is drawn if
        every draw takes as many clusters as there are, with replacement.
        """
        rng = np.random.default_rng([self.seed, 0])
        for size in self._sizes(clusters):
            drawn = rng.integers(0, clusters, size=(size, clusters))
            drawn += np.arange(size)[:, None] * clusters
            counts = np.bincount(drawn.ravel(), minlength=size * clusters)
            yield counts.reshape(size, clusters).astype(np.float64)

    def swaps(self, clusters: int) -> Iterator[Array]:
        """Yield blocks of zeros and ones, shape ``(draws, clusters)``: 1, with probability 1/2,
        if two models are exchanged in the cluster.
        """
        rng = np.random.default_rng([self.seed, 1])
        for size in self._sizes(clusters):
            yield rng.integers(0, 2, size=(size, clusters)).astype(np.float64)

    def _sizes(self, clusters: int) -> Iterator[int]:
        at_once = max(1, NUMBERS_AT_ONCE // clusters)
        for start in range(0, self.number, at_once):
            yield min(at_once, self.number - start)


def intervals(
    sums: Mapping[str, Array], metrics: Mapping[str, Metrics], *, resamples: int, seed: int
) -> dict[str, dict[str, list[float] | None]]:
    """Return 95 % percentile intervals of the metrics of several splits.

    Splits may share clusters, so one draw of clusters weights all of them.

    Args:
        sums: Split to score vectors, shape ``(clusters, K)``, with the same clusters in each split.
        metrics: Split to its metrics.
        resamples: Number of draws.
        seed: Seed of the draws.
    Returns:
        Split to metric to interval; None if the metric is undefined in every draw.
    """
    drawn: dict[str, list[Array]] = {split: [] for split in sums}
    for weights in Draws(resamples, seed).weights(len(next(iter(sums.values())))):
        for split, vectors in sums.items():
            drawn[split].append(weights @ vectors)
    with np.errstate(invalid="ignore", divide="ignore"):
        found = {split: metrics[split](np.concatenate(parts)) for split, parts in drawn.items()}
    return {
        split: {
            name: percentile_interval(undefined_as_nan(draws), 0.95)
            for name, draws in values.items()
        }
        for split, values in found.items()
    }


def undefined_as_nan(values: ArrayLike) -> Array:
    """Return the values, with NaN for those that are not finite, since their denominator is 0."""
    array = np.asarray(values, dtype=np.float64)
    return np.where(np.isfinite(array), array, np.nan)


def percentile_interval(draws: Array, level: float) -> list[float] | None:
    """Return the percentile interval of the defined draws; None without any."""
    defined = draws[~np.isnan(draws)]
    if not defined.size:
        return None
    tail = 50 * (1 - level)
    return np.percentile(defined, [tail, 100 - tail]).tolist()


def spread(draws: Array) -> float | None:
    """Return the standard deviation of the draws that are defined; None for fewer than two."""
    defined = draws[~np.isnan(draws)]
    return float(np.std(defined, ddof=1)) if defined.size > 1 else None


def undefined(draws: Array) -> int:
    """Return the number of undefined draws, which an interval leaves out."""
    return int(np.isnan(draws).sum())
