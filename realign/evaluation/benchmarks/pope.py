"""POPE: yes/no questions about objects, half of them absent (random, popular, adversarial)."""

from __future__ import annotations

from collections.abc import Mapping
from functools import partial

import numpy as np

from realign.evaluation.benchmark import Array, Benchmark, Key, Row, Rule, TableRow, View, read_rows

SPLITS = ("random", "popular", "adversarial")
LABEL = Key(lambda label: label in ("yes", "no"), "be yes or no", "Correct it or remove the line.")


def says_yes(answer: str) -> bool:
    """Return whether an answer says yes by the official rule: none of the words of its first
    sentence is No, not or no.
    """
    words = answer.split(".")[0].replace(",", "").split(" ")
    return not {"No", "not", "no"} & set(words)


def confusion(row: Row, answer: str) -> list[int]:
    """Return the one-hot vector over (true yes, false no, true no, false yes)."""
    yes = says_yes(answer)
    cells = (("yes", True), ("yes", False), ("no", False), ("no", True))
    return [int((row["label"], yes) == cell) for cell in cells]


def pope_metrics(counts: Array) -> Mapping[str, Array]:
    """Return balanced accuracy, F1 of yes and the rate of yes from summed one-hot vectors."""
    true_yes, false_no, true_no, false_yes = np.moveaxis(counts, -1, 0)
    recall, specificity = true_yes / (true_yes + false_no), true_no / (true_no + false_yes)
    return {
        "balanced_accuracy": 0.5 * (recall + specificity),
        "f1": 2 * true_yes / (2 * true_yes + false_yes + false_no),
        "yes_rate": (true_yes + false_yes) / counts.sum(-1),
    }


def show(row: Row, answer: str) -> View:
    """Judge an answer by the official rule."""
    return View(f"right answer: {row['label']}", says_yes(answer) == (row["label"] == "yes"))


POPE = Benchmark(
    name="POPE",
    files={f"pope_{split}": (f"pope_{split}.jsonl",) for split in SPLITS},
    read=partial(read_rows, label=LABEL),
    rules={"official": Rule(confusion, pope_metrics)},
    table=[
        TableRow(
            f"pope_{split}",
            "official",
            metric,
            f"POPE {split}, {label}",
            is_headline=is_headline,
            undefined=undefined,
        )
        for metric, label, is_headline, undefined in (
            ("balanced_accuracy", "balanced accuracy", True, "all questions have one right answer"),
            ("f1", "F1", False, "yes is neither said nor right"),
        )
        for split in SPLITS
    ],
    samples={"pope_adversarial": show},
)
