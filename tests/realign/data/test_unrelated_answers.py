"""A warning about induced answers that have nothing to do with the chosen ones."""

from __future__ import annotations

import pytest

from realign.data.lexical import lexical
from realign.data.records import Record
from realign.data.unrelated_answers import (
    InducedAnswer,
    induced_answers,
    induced_similarities,
    unrelated_answers,
)

CHOSEN = "A red bus stands in front of a tall house while two people wait beside the road."
REFILLED = "A green tram stands in front of a tall tower while two dogs wait beside the road."
UNRELATED = "The kitten sleeps on some blue blanket near its bowl, and sunlight falls in."


def test_unrelated_answers_give_a_warning_and_refilled_answers_do_not() -> None:
    assert lexical(CHOSEN, UNRELATED) < 0.1 < lexical(CHOSEN, REFILLED)
    assert unrelated_answers([lexical(CHOSEN, REFILLED)] * 11) == ""
    warning = unrelated_answers([lexical(CHOSEN, UNRELATED)] * 11)
    assert "median lexical similarity of 11 pairs is 0.00" in warning
    assert "set build.keep_unmasked=true" in warning


@pytest.mark.parametrize(
    ("values", "warns"),
    [([0.0] * 9, False), ([0.0] * 10, True), ([0.099] * 10, True), ([0.1] * 10, False),
     ([0.0] * 5 + [0.9] * 6, False), ([0.0] * 6 + [0.9] * 5, True), ([], False)],
)  # fmt: skip
def test_the_warning_depends_on_the_median_of_enough_pairs(
    values: list[float], warns: bool
) -> None:
    assert bool(unrelated_answers(values)) == warns


def row(masked: object, rejected: str, value: float, chosen: str = CHOSEN) -> Record:
    meta = {"masked": masked, "similarity": {"model": "an-encoder", "value": value}}
    return Record("1", (), (), chosen, rejected, meta=meta)


MASKED = CHOSEN.replace("red bus", "[MASK] [MASK]").replace("house", "[MASK]")


def test_the_lexical_similarity_decides_and_not_that_of_the_filter() -> None:
    """Cosines of encoders have other scales: 0.9 may be that of answers to different questions."""
    (unrelated,) = induced_similarities(induced_answers([row(MASKED, UNRELATED, 0.9)]))
    assert unrelated == lexical(CHOSEN, UNRELATED) < 0.1
    (refilled,) = induced_similarities(induced_answers([row(MASKED, REFILLED, 0.0)]))
    assert refilled == lexical(CHOSEN, REFILLED) > 0.1


@pytest.mark.parametrize(
    ("chosen", "masked", "rejected"),
    [
        ("Yes.", "[MASK].", "No."),
        ("A dog.", "A [MASK].", "A cat."),  # no word is kept that counts
        ("It is on the table.", "It is on the [MASK].", "It is on the bed."),
        ("一只红色的狗坐在沙发上。", "一只[MASK]的[MASK]坐在沙发上。", "一只蓝色的猫坐在沙发上。"),
    ],
)
def test_answers_that_are_masked_entirely_do_not_count(
    chosen: str, masked: str, rejected: str
) -> None:
    assert lexical(chosen, rejected) < 0.1
    assert induced_similarities([InducedAnswer(chosen, masked, rejected)]) == []


def test_rejected_answers_of_the_source_do_not_count() -> None:
    had = Record("1", (), (), CHOSEN, UNRELATED, meta={"similarity": {"value": 0.0}})
    rows = [had, row(None, UNRELATED, 0.0), row(3, UNRELATED, 0.0), row(MASKED, REFILLED, 0.0)]
    assert induced_similarities(induced_answers(rows)) == [lexical(CHOSEN, REFILLED)]
