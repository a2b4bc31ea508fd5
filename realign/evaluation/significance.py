"""Formulas of significance: McNemar's test, Student's distribution, Holm's adjustment, the
clustered standard error, and the smallest detectable difference.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from statistics import NormalDist

import numpy as np
from numpy.typing import ArrayLike, NDArray

CONFIDENCE = 0.95
POWER = 0.8


def mcnemar_p(gained: int, lost: int) -> float:
    """Return the exact two-sided p value of McNemar's test.

    Under the null hypothesis each of the items on which two models differ is as likely to be gained
    as lost, so that the smaller count is binomial with probability 1/2.

    Args:
        gained: Number of items that only the second model has right.
        lost: Number of items that only the first model has right.

    Example::

        mcnemar_p(22, 7)  # 0.0081
    """
    total = gained + lost
    tail = ways = 1  # integers: no rounding before the division
    for k in range(min(gained, lost)):
        ways = ways * (total - k) // (k + 1)
        tail += ways
    return min(1.0, 2 * tail / 2**total)


def student_cdf(t: float, degrees: int) -> float:
    """Return the probability that Student's t is at most ``t``, for a whole number of degrees of
    freedom.

    Source: Abramowitz and Stegun, Handbook of Mathematical Functions, 26.7.3 and 26.7.4.
    """
    angle = math.atan2(t, math.sqrt(degrees))
    cosine_squared = math.cos(angle) ** 2
    is_odd = degrees % 2 == 1
    term = math.cos(angle) if is_odd else 1.0
    total = term if degrees > 1 else 0.0
    for k in range(3 if is_odd else 2, degrees - 1, 2):
        term *= cosine_squared * (k - 1) / k
        total += term
    area = math.sin(angle) * total
    if is_odd:
        area = 2 / math.pi * (angle + area)
    return 0.5 + area / 2


def student_quantile(probability: float, degrees: int) -> float:
    """Return the value that Student's t does not exceed with a probability between 0 and 1."""
    if probability < 0.5:
        return -student_quantile(1 - probability, degrees)
    high = 1.0
    while student_cdf(high, degrees) < probability:
        high *= 2
    low = 0.0
    for _ in range(200):  # bisection, until the bounds are neighbouring floats
        middle = (low + high) / 2
        if middle in (low, high):
            break
        low, high = (middle, high) if student_cdf(middle, degrees) < probability else (low, middle)
    return high


def student_interval(values: Sequence[float], level: float = CONFIDENCE) -> list[float] | None:
    """Return the t-interval of a mean; None for fewer than two values."""
    if len(values) < 2:
        return None
    mean, error = float(np.mean(values)), _error_of_mean(values)
    half = student_quantile(0.5 + level / 2, len(values) - 1) * error
    return [mean - half, mean + half]


def student_p(values: Sequence[float]) -> float | None:
    """Return the two-sided p value of the t-test that a mean is 0; None for fewer than two values,
    or if all values are equal and not 0.
    """
    if len(values) < 2:
        return None
    mean, error = float(np.mean(values)), _error_of_mean(values)
    if error == 0:
        return 1.0 if mean == 0 else None
    return 2 * student_cdf(-abs(mean) / error, len(values) - 1)


def student_spread(values: Sequence[float]) -> tuple[float, float] | tuple[None, None]:
    """Return the standard error of a mean over training runs, and the smallest mean that a t-test
    detects with 80 % power; (None, None) for fewer than two values.
    """
    if len(values) < 2:
        return None, None
    error, degrees = _error_of_mean(values), len(values) - 1
    both = student_quantile(0.5 + CONFIDENCE / 2, degrees) + student_quantile(POWER, degrees)
    return error, both * error


def _error_of_mean(values: Sequence[float]) -> float:
    return float(np.std(values, ddof=1)) / math.sqrt(len(values))


def holm(p_values: Sequence[float]) -> list[float]:
    """Return p values adjusted for their number by Holm's method, in the given order."""
    order = sorted(range(len(p_values)), key=p_values.__getitem__)
    adjusted, highest = [0.0] * len(p_values), 0.0
    for rank, place in enumerate(order):
        highest = max(highest, min(1.0, (len(p_values) - rank) * p_values[place]))
        adjusted[place] = highest
    return adjusted


def standard_errors(
    values: ArrayLike, clusters: NDArray[np.int64]
) -> tuple[float, float] | tuple[None, None]:
    """Return two standard errors of a mean: for independent items, and for items in clusters.

    Args:
        values: One value per item.
        clusters: Number of each item's cluster, from 0.
    Returns:
        naive, clustered: ``sqrt(variance / n)``, and the square root of that plus the products of
        the deviations of all pairs of different items in one cluster, divided by ``n**2``. (None,
        None) for fewer than two items.

    Source: Miller 2024, "Adding Error Bars to Evals", equations 1 and 4.
    """
    values = np.asarray(values, dtype=np.float64)
    n = len(values)
    if n < 2:
        return None, None
    deviations = values - values.mean()
    squares = float(deviations @ deviations)
    naive = squares / (n - 1) / n
    sums = np.bincount(clusters, weights=deviations)
    pairs = float(sums @ sums) - squares
    # opposite deviations within clusters can at most cancel the variance, except for rounding
    return math.sqrt(naive), math.sqrt(max(0.0, naive + pairs / n**2))


def detectable_share(
    items: int, discordant: int, design_effect: float = 1.0, level: float = CONFIDENCE
) -> float | None:
    """Return the smallest difference of two shares that McNemar's test finds with 80 % power.

    Args:
        items: Number of items that both models answered.
        discordant: Number of items on which exactly one of the models is right.
        design_effect: Factor by which clusters increase the variance of the difference.
        level: One minus the significance level.
    Returns:
        difference: None if no item is discordant, or there are too few items.

    Source: Connor 1987, "Sample size for testing differences in proportions for the paired-sample
    design", solved for the difference.
    """
    normal = NormalDist()
    alpha, beta = normal.inv_cdf(0.5 + level / 2), normal.inv_cdf(POWER)
    if not discordant or design_effect <= 0:
        return None
    n = items / design_effect
    root = n + beta**2 - alpha**2
    if root < 0:
        return None
    share = math.sqrt(discordant / items)
    return share * (math.sqrt(n) * alpha + beta * math.sqrt(root)) / (n + beta**2)


def detectable_difference(standard_error: float, level: float = CONFIDENCE) -> float:
    """Return the smallest difference that a two-sided test finds with 80 % power, from the standard
    error of the difference.
    """
    normal = NormalDist()
    return (normal.inv_cdf(0.5 + level / 2) + normal.inv_cdf(POWER)) * standard_error
