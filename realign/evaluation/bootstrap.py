"""Paired bootstrap over images: several models answered about the same ones, so they are resampled
together.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import numpy as np
from numpy.typing import NDArray

Array = NDArray[np.float64]
Metrics = Callable[[Array], Mapping[str, Array]]


def paired_scores(
    counts: Mapping[str, Array], metrics: Metrics, *, baseline: str, resamples: int, seed: int
) -> dict[str, dict[str, dict[str, Any]]]:
    """Score every model with 95 % intervals, and its difference from the baseline with one of its
    own.

    Questions about one image are not independent, so images are drawn, with everything asked about
    them.

    Args:
        counts: Model name to counts, shape ``(images, K)``, the same images in the same order.
        metrics: Counts summed over images, shape ``(..., K)``, to named scores, shape ``(...)``.
        baseline: The model that the others are compared with.
        resamples: How many draws.
        seed: Of the draws.
    Returns:
        model -> metric -> value, interval, difference, difference_interval (percentile intervals).
    """
    images = len(counts[baseline])
    rng = np.random.default_rng(seed)
    weights = rng.multinomial(images, np.full(images, 1 / images), size=resamples).astype(
        np.float64
    )
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
    return [float(x) for x in np.nanpercentile(draws, [2.5, 97.5])]
