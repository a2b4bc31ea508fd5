"""POPE: yes/no questions about objects, half of them absent (random, popular, adversarial)."""

from __future__ import annotations

from collections.abc import Mapping

import numpy as np
from numpy.typing import NDArray

SPLITS = ("random", "popular", "adversarial")
Counts = NDArray[np.float64]  # (images, 4): true yes, false no, true no, false yes


def says_yes(answer: str) -> bool:
    """The official rule: the first sentence says no if one of its words is No, not or no;
    otherwise it says yes.
    """
    words = answer.split(".")[0].replace(",", "").split(" ")
    return not {"No", "not", "no"} & set(words)


def confusion(label: str, answer: str) -> list[int]:
    """One-hot over (true yes, false no, true no, false yes)."""
    yes = says_yes(answer)
    cells = (("yes", True), ("yes", False), ("no", False), ("no", True))
    return [int((label, yes) == cell) for cell in cells]


def pope_metrics(counts: Counts) -> Mapping[str, Counts]:
    """Metrics from summed counts.

    Args:
        counts: Shape ``(..., 4)``.
    Returns:
        balanced_accuracy, f1 (of yes), yes_rate: Shape ``(...)``, fractions.
    """
    true_yes, false_no, true_no, false_yes = np.moveaxis(counts, -1, 0)
    with np.errstate(invalid="ignore", divide="ignore"):
        return {
            "balanced_accuracy": 0.5
            * (true_yes / (true_yes + false_no) + true_no / (true_no + false_yes)),
            "f1": 2 * true_yes / (2 * true_yes + false_yes + false_no),
            "yes_rate": (true_yes + false_yes) / counts.sum(-1),
        }
