"""The emulation of tensor cores that truncate their sums."""

from __future__ import annotations

from fractions import Fraction

import numpy as np

from benchmarks.head import truncation
from benchmarks.head.truncation import CASES, PARTIAL, errors, product, truncated

PROMISE = 1e-4


def test_bits_beyond_float32_are_truncated_towards_zero_for_both_signs():
    one = Fraction(1)
    last_bit = Fraction(1, 2**23)
    for sign in (1, -1):
        kept = [one, one, one + last_bit, one + last_bit]
        values = [one, one + last_bit * 3 / 4, one + last_bit, one + last_bit * 7 / 4]
        given = truncated(np.array([float(sign * value) for value in values]))
        assert [Fraction(float(value)) for value in given] == [sign * value for value in kept]


def test_small_integers_are_multiplied_exactly():
    generator = np.random.default_rng(0)
    hidden, weight = (generator.integers(-9, 9, size=(n, 70)).astype(float) for n in (3, 5))
    assert np.array_equal(product(hidden, weight, partial=32), hidden @ weight.T)


def test_partial_sums_stay_within_the_error_bound_that_one_accumulator_exceeds(monkeypatch):
    monkeypatch.setattr(truncation, "VOCABULARY", 300)
    for case in CASES[1:]:
        assert errors(case, 8192, 8192).largest > PROMISE
        assert errors(case, 8192, PARTIAL).largest < PROMISE
