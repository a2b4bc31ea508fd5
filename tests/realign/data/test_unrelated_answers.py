"""A warning about induced answers that have nothing to do with the chosen ones."""

from __future__ import annotations

import pytest

from realign.building.similarity import lexical
from realign.data.unrelated_answers import induced_similarities, unrelated_answers

CHOSEN = "A red bus stands in front of a tall house while two people wait beside the road."
REFILLED = "A green tram stands in front of a tall tower while two dogs wait beside the road."
UNRELATED = "The kitten sleeps on some blue blanket near its bowl, and sunlight falls in."


def test_refilled_answers_are_as_they_should_be_and_unrelated_ones_are_not() -> None:
    assert lexical(CHOSEN, UNRELATED) < 0.1 < lexical(CHOSEN, REFILLED)
    assert unrelated_answers([lexical(CHOSEN, REFILLED)] * 11) == ""
    said = unrelated_answers([lexical(CHOSEN, UNRELATED)] * 11)
    assert "median similarity of 11 pairs is 0.00" in said
    assert "set build.keep_unmasked=true" in said


@pytest.mark.parametrize(
    ("values", "warns"),
    [([0.0] * 9, False), ([0.0] * 10, True), ([0.099] * 10, True), ([0.1] * 10, False),
     ([0.0] * 5 + [0.9] * 6, False), ([0.0] * 6 + [0.9] * 5, True), ([], False)],
)  # fmt: skip
def test_the_median_of_enough_pairs_decides(values: list[float], warns: bool) -> None:
    assert bool(unrelated_answers(values)) == warns


def test_answers_that_the_source_had_and_damaged_values_do_not_count() -> None:
    metas = [
        {"masked": "a [MASK]", "similarity": {"value": 0.5}},
        {"similarity": {"value": 0.1}},
        {"masked": "a [MASK]", "similarity": {"value": None}},
        {"masked": "a [MASK]", "similarity": {"value": float("nan")}},
        {"masked": "a [MASK]", "similarity": "0.5"},
        {"masked": "[MASK].", "similarity": {"value": 0.0}},  # one word, which may become any other
        {},
    ]
    assert induced_similarities(metas) == [0.5]
