"""Paired bootstrap over clusters: several models answered about the same ones, so they are
resampled together.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import numpy as np
from numpy.typing import ArrayLike

from realign.evaluation.benchmark import Array, Metrics
from realign.runtime.files import finite_or_null

DRAWS_AT_ONCE = 500  # so that the weights of a thousand clusters take 4 MB


def paired_scores(
    counts: Mapping[str, Array], metrics: Metrics, *, baseline: str, resamples: int, seed: int
) -> dict[str, dict[str, dict[str, Any]]]:
    """Score every model with 95 % intervals, and its difference from the baseline with one of its
    own.

    Questions about one image are not independent, so clusters are drawn, with everything asked
    about them.

    Args:
        counts: Model name to score vectors, shape ``(clusters, K)``, the same clusters in the same
            order.
        metrics: Vectors summed over clusters, shape ``(..., K)``, to named scores, shape ``(...)``.
        baseline: The model that the others are compared with.
        resamples: Number of draws.
        seed: Of the draws.
    Returns:
        model -> metric -> value, interval, difference, difference_interval (percentile intervals),
        each None where it is not defined; undefined_draws, how many draws an interval leaves out
        because the metric is not defined in them.
    """
    clusters = len(counts[baseline])
    rng = np.random.default_rng(seed)
    weights = rng.multinomial(clusters, np.full(clusters, 1 / clusters), size=resamples).astype(
        np.float64
    )
    with np.errstate(invalid="ignore", divide="ignore"):
        point = {model: metrics(values.sum(0)) for model, values in counts.items()}
        drawn = {model: metrics(weights @ values) for model, values in counts.items()}
    scores: dict[str, dict[str, dict[str, Any]]] = {}
    for model in counts:
        scores[model] = {}
        for name in point[model]:
            values = {m: _undefined_as_nan(point[m][name]) for m in (model, baseline)}
            draws = {m: _undefined_as_nan(drawn[m][name]) for m in (model, baseline)}
            scores[model][name] = {
                "value": finite_or_null(float(values[model])),
                "interval": _interval(draws[model]),
                "difference": finite_or_null(float(values[model] - values[baseline])),
                "difference_interval": _interval(draws[model] - draws[baseline]),
                "undefined_draws": int(np.isnan(draws[model]).sum()),
            }
    return scores


def intervals(
    sums: Mapping[str, Array], metrics: Mapping[str, Metrics], *, resamples: int, seed: int
) -> dict[str, dict[str, list[float] | None]]:
    """Return 95 % percentile intervals of the metrics of several splits.

    Splits may share clusters, so one draw of clusters weights all of them.

    Args:
        sums: Split to score vectors, shape ``(clusters, K)``, the same clusters in each.
        metrics: Split to its metrics.
        resamples: Number of draws.
        seed: Of the draws.
    Returns:
        Split to metric to interval, None where no draw defines it.
    """
    clusters = len(next(iter(sums.values())))
    rng = np.random.default_rng(seed)
    drawn: dict[str, list[Array]] = {split: [] for split in sums}
    for start in range(0, resamples, DRAWS_AT_ONCE):
        size = min(DRAWS_AT_ONCE, resamples - start)
        weights = rng.multinomial(clusters, np.full(clusters, 1 / clusters), size=size)
        for split, vectors in sums.items():
            drawn[split].append(weights.astype(np.float64) @ vectors)
    with np.errstate(invalid="ignore", divide="ignore"):
        found = {split: metrics[split](np.concatenate(parts)) for split, parts in drawn.items()}
    return {
        split: {name: _interval(_undefined_as_nan(draws)) for name, draws in values.items()}
        for split, values in found.items()
    }


def _undefined_as_nan(values: ArrayLike) -> Array:
    """Return the values, with NaN for those that are not finite: their denominator is 0."""
    array = np.asarray(values, dtype=np.float64)
    return np.where(np.isfinite(array), array, np.nan)


def _interval(draws: Array) -> list[float] | None:
    defined = draws[~np.isnan(draws)]
    return np.percentile(defined, [2.5, 97.5]).tolist() if defined.size else None
