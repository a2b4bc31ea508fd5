"""Exact formulas against published values, tables and sums that are made by hand."""

from __future__ import annotations

import math
from itertools import product

import numpy as np
import pytest

from realign.evaluation.significance import (
    detectable_difference,
    detectable_share,
    holm,
    mcnemar_p,
    standard_errors,
    student_cdf,
    student_interval,
    student_p,
    student_quantile,
    student_spread,
)


@pytest.mark.parametrize(
    ("gained", "lost", "p"),
    [
        *((15, 0, 0.0001), (22, 7, 0.0081), (30, 15, 0.0357), (51, 36, 0.1329)),
        *((80, 65, 0.2449), (153, 138, 0.4119), (33, 18, 0.0489)),
        *((2, 0, 0.5), (4, 0, 0.125), (7, 3, 0.3438), (12, 8, 0.5034), (0, 0, 1), (5, 5, 1)),
    ],
)
def test_mcnemar_p_equals_published_values(gained: int, lost: int, p: float) -> None:
    assert mcnemar_p(gained, lost) == mcnemar_p(lost, gained) == pytest.approx(p, abs=5e-5)


def test_mcnemar_p_equals_full_enumeration() -> None:
    ways = [sum(signs) for signs in product((0, 1), repeat=9)]
    wanted = sum(abs(gained - 4.5) >= 2.5 for gained in ways) / len(ways)
    assert mcnemar_p(7, 2) == wanted


def test_mcnemar_of_many_items_is_nearly_normal() -> None:
    z = (7_200 - 7_016 - 1) / math.sqrt(14_216)  # with the correction for continuity
    assert mcnemar_p(7_200, 7_016) == pytest.approx(math.erfc(z / math.sqrt(2)), abs=1e-4)


@pytest.mark.parametrize(  # of the tables that statistics books print
    ("degrees", "quantile"),
    [(1, 12.7062), (2, 4.30265), (3, 3.18245), (4, 2.77645), (9, 2.26216), (30, 2.04227)],
)
def test_student_quantiles_equal_published_values(degrees: int, quantile: float) -> None:
    assert student_quantile(0.975, degrees) == pytest.approx(quantile, abs=5e-5)
    assert student_quantile(0.025, degrees) == pytest.approx(-quantile, abs=5e-5)
    assert student_cdf(quantile, degrees) == pytest.approx(0.975, abs=1e-5)
    assert student_cdf(0, degrees) == 0.5


def test_student_distributions_of_one_and_two_degrees_have_closed_forms() -> None:
    for t in (-7.0, -0.3, 0.4, 2.5):
        assert student_cdf(t, 1) == pytest.approx(0.5 + math.atan(t) / math.pi)
        assert student_cdf(t, 2) == pytest.approx(0.5 + t / (2 * math.sqrt(2 + t * t)))


def test_the_interval_of_a_mean_over_runs_equals_a_computation_by_hand() -> None:
    values = [1.0, 2.0, 3.0, 4.0, 5.0]  # standard deviation sqrt(2.5), so an error of sqrt(0.5)
    half = 2.77645 * math.sqrt(0.5)
    assert student_interval(values) == pytest.approx([3 - half, 3 + half], abs=1e-4)
    assert student_p([0.0, 2.0]) == pytest.approx(0.5)  # t = 1 with one degree of freedom
    error, detectable = student_spread(values)
    assert error == pytest.approx(math.sqrt(0.5))
    assert detectable == pytest.approx((2.77645 + 0.94096) * math.sqrt(0.5), abs=1e-4)
    assert student_interval([1.0]) is student_p([1.0]) is None
    assert student_spread([1.0]) == (None, None)
    assert student_p([0.0, 0.0]) == 1
    assert student_p([2.0, 2.0]) is None


def test_holm_correction_equals_a_computation_by_hand() -> None:
    assert holm([0.01, 0.04, 0.03, 0.005]) == pytest.approx([0.03, 0.06, 0.06, 0.02])
    assert holm([0.9, 0.8]) == [1.0, 1.0]
    assert holm([]) == []


def test_clustered_standard_errors_equal_a_computation_by_hand() -> None:
    values, clusters = [1, 1, 0, 0, 1, 0], np.array([0, 0, 1, 1, 2, 2])
    naive, clustered = standard_errors(values, clusters)
    # deviations of 1/2: variance 6/4/5, and pairs of +1/4, +1/4 and -1/4, each counted twice
    assert naive == pytest.approx(math.sqrt(0.3 / 6))
    assert clustered == pytest.approx(math.sqrt(0.3 / 6 + 2 * 0.25 / 36))
    # pairs that err in opposite directions make it smaller
    naive, clustered = standard_errors([1, 0, 1, 0], np.array([0, 0, 1, 1]))
    assert naive == pytest.approx(math.sqrt(1 / 12))
    assert clustered == pytest.approx(math.sqrt(1 / 12 - 4 * 0.25 / 16))


def test_clusters_of_one_item_do_not_change_the_standard_error() -> None:
    naive, clustered = standard_errors([1, 0, 0, 1, 1], np.arange(5))
    assert naive == clustered == pytest.approx(math.sqrt(0.3 / 5))
    assert standard_errors([1], np.array([0])) == (None, None)


def power_of_mcnemar(items: int, discordant: float, difference: float) -> float:
    """The share of samples in which the normal test of McNemar rejects, computed cell by cell."""
    total = round(items * discordant)
    share = 0.5 + difference / discordant / 2
    found = 0.0
    for gained in range(total + 1):
        log_p = math.lgamma(total + 1) - math.lgamma(gained + 1) - math.lgamma(total - gained + 1)
        log_p += gained * math.log(share) + (total - gained) * math.log(1 - share)
        if abs(2 * gained - total) / math.sqrt(total) > 1.959964:
            found += math.exp(log_p)
    return found


def test_the_detectable_share_is_found_in_four_samples_of_five() -> None:
    difference = detectable_share(2910, 145)
    assert difference is not None
    assert power_of_mcnemar(2910, 145 / 2910, difference) == pytest.approx(0.8, abs=0.02)
    assert detectable_share(2910, 145, design_effect=4) == pytest.approx(2 * difference, rel=0.01)
    assert detectable_share(2910, 0) is None
    assert detectable_share(2, 1) is None


def test_the_detectable_difference_is_2_80_standard_errors() -> None:
    assert detectable_difference(0.5) == pytest.approx(0.5 * (1.959964 + 0.841621), abs=1e-6)
