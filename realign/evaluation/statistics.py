"""Paired bootstrap over clusters: several models answered about the same ones, so they are
resampled together.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import numpy as np

from realign.evaluation.benchmark import Array, Metrics


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
        model -> metric -> value, interval, difference, difference_interval (percentile intervals).
    """
    clusters = len(counts[baseline])
    rng = np.random.default_rng(seed)
    weights = rng.multinomial(clusters, np.full(clusters, 1 / clusters), size=resamples).astype(
        np.float64
    )
    with np.errstate(invalid="ignore", divide="ignore"):
        point = {model: metrics(values.sum(0)) for model, values in counts.items()}
        drawn = {model: metrics(weights @ values) for model, values in counts.items()}
    return {
        model: {
            name: {
                "value": float(point[model][name]),
                "interval": _interval(drawn[model][name]),
                "difference": float(point[model][name] - point[baseline][name]),
                "difference_interval": _interval(drawn[model][name] - drawn[baseline][name]),
            }
            for name in point[model]
        }
        for model in counts
    }


def _interval(draws: Array) -> list[float]:
    defined = draws[~np.isnan(draws)]
    return np.percentile(defined, [2.5, 97.5]).tolist() if defined.size else [np.nan, np.nan]
