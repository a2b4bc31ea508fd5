"""Signs of answers beside their scores, counted by hand."""

from __future__ import annotations

import pytest

from realign.evaluation.benchmarks.chair import CHAIR
from realign.evaluation.benchmarks.pope import POPE
from realign.evaluation.probes import probes, repeats
from realign.generation.generator import Answer


def test_probes_equal_counts_by_hand() -> None:
    circles = "a dog on a a dog on a a dog on a"
    answers = [
        Answer(" Yes.", num_tokens=2),
        Answer("No, there is no dog.", num_tokens=6),
        Answer(circles, is_cut=True, num_tokens=12),
        Answer("\n", num_tokens=0),
    ]
    assert probes(POPE, answers) == {
        "mean_tokens": 5.0,
        "mean_words": (1 + 5 + 12 + 0) / 4,
        "share_empty": 0.25,
        "share_cut": 0.25,
        "share_repeating": 0.25,
        "yes_ratio": 0.75,  # an empty answer is a yes by the official rule
        "yes_rule": "official",
    }


def test_a_probe_that_cannot_be_computed_is_none() -> None:
    found = probes(CHAIR, [Answer("A dog.", num_tokens=3), Answer("A cat.")])
    assert (found["mean_tokens"], found["yes_ratio"], found["yes_rule"]) == (None, None, None)


@pytest.mark.parametrize(
    ("text", "circles"),
    [
        ("", False),
        ("one two three four " * 2, False),  # twice
        ("one two three four " * 3, True),
        ("One two THREE four five one Two three four six one two three Four", True),
        ("dog dog dog dog dog", False),  # two places of one sequence
        ("dog dog dog dog dog dog", True),
        ("one two three " * 9, True),
        ("There is a dog. There is a cat. There is a cow.", False),
    ],
)
def test_answers_that_repeat_themselves_are_found(text: str, circles: bool) -> None:
    assert repeats(text) is circles
