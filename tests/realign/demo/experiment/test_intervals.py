"""Intervals against published quantiles and closed forms."""

from __future__ import annotations

import math
import random

import numpy as np
import pytest

from realign.demo.experiment.intervals import (
    image_intervals,
    t_distribution,
    t_interval,
    t_quantile,
)
from realign.demo.experiment.scores import ModelAnswers

# the usual table of Student's t: degrees of freedom, 97.5 % and 99.5 % quantile
PUBLISHED = (
    (1, 12.7062, 63.6567),
    (2, 4.3027, 9.9248),
    (3, 3.1824, 5.8409),
    (4, 2.7764, 4.6041),
    (5, 2.5706, 4.0321),
    (9, 2.2622, 3.2498),
    (10, 2.2281, 3.1693),
    (30, 2.0423, 2.7500),
)


@pytest.mark.parametrize(("freedom", "of_95", "of_99"), PUBLISHED)
def test_t_quantiles_equal_published_values(freedom: int, of_95: float, of_99: float) -> None:
    assert t_quantile(0.975, freedom) == pytest.approx(of_95, abs=6e-5)
    assert t_quantile(0.995, freedom) == pytest.approx(of_99, abs=6e-5)


@pytest.mark.parametrize("freedom", range(1, 9))
def test_the_t_distribution_equals_the_integral_of_its_density(freedom: int) -> None:
    values = np.linspace(0, 2, 20001)
    scale = math.gamma((freedom + 1) / 2) / (math.sqrt(freedom * math.pi) * math.gamma(freedom / 2))
    density = scale * (1 + values**2 / freedom) ** (-(freedom + 1) / 2)
    area = np.trapezoid(density, values)
    assert t_distribution(2.0, freedom) == pytest.approx(0.5 + area, abs=1e-9)
    assert t_distribution(0.0, freedom) == 0.5


def test_an_interval_spans_t_standard_errors_around_the_mean() -> None:
    mean, low, high = t_interval([1.0, 2.0, 3.0, 4.0, 5.0])
    half = 2.7764451 * math.sqrt(2.5) / math.sqrt(5)
    assert (mean, low, high) == (3.0, pytest.approx(3 - half), pytest.approx(3 + half))


def test_one_seed_gives_an_unbounded_interval() -> None:
    assert t_interval([0.3]) == (0.3, -math.inf, math.inf)


def test_intervals_cover_the_true_mean_at_their_level() -> None:
    rng = random.Random(0)
    hits = 0
    for _ in range(2000):
        _, low, high = t_interval([rng.gauss(1.0, 2.0) for _ in range(5)])
        hits += low < 1.0 < high
    assert abs(hits / 2000 - 0.95) < 0.015  # three standard errors


def captions(absent: np.ndarray) -> ModelAnswers:
    """Captions that name two objects each, ``absent`` of them not there."""
    counts = np.zeros((len(absent), 13))
    counts[:, 0], counts[:, 1], counts[:, 2], counts[:, 3] = 2, absent, 2, 2 - absent
    counts[:, 4], counts[:, 5] = 1, absent > 0
    return ModelAnswers({"free": np.pad(counts, ((0, 0), (0, 18)))}, NO_ODDS, (None,))


NO_ODDS = {
    f"free.{split}": (np.zeros(0), np.zeros(0), np.zeros(0, int))
    for split in ("random", "popular", "adversarial")
}


def test_the_bootstrap_draws_the_same_images_for_both_models() -> None:
    rng = np.random.default_rng(1)
    absent = rng.integers(0, 2, 400)
    one, other = captions(absent), captions(absent)
    found = image_intervals(one, other, ["free.chair_i"], resamples=50)
    assert found["free.chair_i"] == (0.0, 0.0, 0.0)


def test_the_interval_over_images_is_that_of_a_mean() -> None:
    rng = np.random.default_rng(2)
    first, second = rng.binomial(2, 0.1, 500), rng.binomial(2, 0.3, 500)
    found = image_intervals(captions(first), captions(second), ["free.chair_i"], resamples=2000)
    mean, low, high = found["free.chair_i"] or (0.0, 0.0, 0.0)
    each = (first - second) / 2  # CHAIR_i of captions that name as much is a mean
    error = each.std() / math.sqrt(500)
    assert mean == pytest.approx(each.mean())
    assert low == pytest.approx(mean - 1.96 * error, abs=0.2 * error)
    assert high == pytest.approx(mean + 1.96 * error, abs=0.2 * error)


def test_an_undefined_measure_has_no_interval() -> None:
    one = captions(np.zeros(5, int))
    assert image_intervals(one, one, ["free.random.auc"], resamples=5) == {"free.random.auc": None}
