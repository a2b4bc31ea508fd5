"""AMBER: yes/no questions about the contents of an image, and descriptions of it."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import numpy as np

from realign.errors import RefusedError
from realign.evaluation.answer_words import yes_or_no
from realign.evaluation.benchmark import (
    AnswerFormat,
    Array,
    Benchmark,
    Layout,
    Metrics,
    Prompt,
    Rule,
    TableRow,
    of_items,
)
from realign.evaluation.rows import Key, Row, check_row, read_records

ANNOTATIONS = "annotations.json"
QUESTIONS = "query_discriminative.json"
SPLITS = {
    "discriminative-hallucination": ("existence",),
    "discriminative-attribute-state": ("attribute", "state"),
    "discriminative-attribute-number": ("attribute", "number"),
    "discriminative-attribute-action": ("attribute", "action"),
    "discriminative-relation": ("relation",),
    "relation": ("relation",),
}
DIMENSIONS = ("attribute", "existence", "relation")
START = 0.001  # where every denominator of the official script begins

Truths = Mapping[int, tuple[str, Any]]  # the place of an annotation and the annotation, by id

ID = Key(
    lambda value: isinstance(value, int) and not isinstance(value, bool),
    "be an integer",
    "Take the published file.",
)
STRING = Key(lambda value: isinstance(value, str), "be a string", "Put it into quotes.")
_TRUTH = Key(lambda value: value in ("yes", "no"), 'be "yes" or "no"', "Take the published file.")
_TYPE = Key(lambda value: value in [*SPLITS], f"be one of {', '.join(SPLITS)}", "Correct it.")


def beside_or_above(path: Path, name: str) -> Path:
    """Return a published file that lies beside another one, or in the folder above it.

    Raises:
        RefusedError: There is none.
    """
    for place in (path.with_name(name), path.parents[1] / name):
        if place.is_file():
            return place
    raise RefusedError(
        f"data requires {name} beside {path.name} or in the folder above it, got none for {path}. "
        "Add the published file."
    )


def read_annotations(path: Path) -> Truths:
    """Read the annotations that belong to a file of questions, by id, each with its place."""
    return {
        record["id"]: (where, record)
        for where, record in read_records(beside_or_above(path, ANNOTATIONS))
        if isinstance(record, dict) and isinstance(record.get("id"), int)
    }


def truth_of(row: Row, truths: Truths, keys: Mapping[str, Key]) -> Row:
    """Return the annotation of a question.

    Raises:
        RefusedError: There is none, or it has another form.
    """
    if row["id"] not in truths:
        raise RefusedError(
            f"{row['where']}: {ANNOTATIONS} must hold its id, got none of {row['id']}. Take both "
            "files of one publication."
        )
    where, record = truths[row["id"]]
    return check_row(record, where, keys)


def read_questions(path: Path) -> list[Row]:
    """Read the yes/no questions and, from the annotations, their types and right answers.

    Raises:
        RefusedError: The annotations are missing or lack a question.
    """
    truths = read_annotations(path)
    rows = []
    for where, record in read_records(path):
        row = check_row(record, where, {"id": ID, "image": STRING, "query": STRING})
        truth = truth_of(row, truths, {"type": _TYPE, "truth": _TRUTH})
        row |= {"text": row["query"], "type": truth["type"], "truth": truth["truth"]}
        rows.append({**row, "id": str(row["id"])})
    return rows


def official_word(answer: str) -> bool | None:
    """Return whether an answer is exactly "Yes" (True) or "No" (False); None for any other."""
    return {"Yes": True, "No": False}.get(answer)


def counts_of(parse: Callable[[str], bool | None]) -> Callable[[Row, str], list[int]]:
    """Return the score function of a rule, which counts questions, right answers, tp, fp, tn and fn
    with No as the positive class, and answers that are Yes.

    An answer that is neither Yes nor No is wrong; if No is right, it is a false negative.
    """

    def score(row: Row, answer: str) -> list[int]:
        reading, is_no = parse(answer), row["truth"] == "no"
        return [
            1,
            int(reading is not None and reading != is_no),
            int(reading is False and is_no),
            int(reading is False and not is_no),
            int(reading is True and not is_no),
            int(reading is not False and is_no),
            int(reading is True),
        ]

    return score


def official_metrics(*, starts: int = 1, epsilon: float = 0.0001) -> Metrics:
    """Return the metrics of the official script, in percent with one decimal.

    Args:
        starts: How many denominators, each of which begins at 0.001, are added.
        epsilon: What the denominator of F1, which is computed from rounded numbers, begins at.
    """

    def metrics(counts: Array) -> Mapping[str, Array]:
        total, right, tp, fp, tn, fn, said_yes = np.moveaxis(counts, -1, 0)
        start = START * starts
        accuracy = rounded(100 * right / (total + start))
        precision = rounded(100 * tp / (tp + fp + start))
        recall = rounded(100 * tp / (tp + fn + start))
        # in the order of the script, since many values lie halfway between two decimals
        f1 = 2 * (precision / 100) * (recall / 100)
        f1 = rounded(f1 / (precision / 100 + recall / 100 + epsilon) * 100)
        return {
            "accuracy": accuracy,
            "precision": precision,
            "recall": recall,
            "f1": f1,
            "yes_ratio": 100 * said_yes / total,
            "tp": tp,
            "fp": fp,
            "tn": tn,
            "fn": fn,
        }

    return metrics


def right_by_dimension(row: Row, answer: str) -> list[int]:
    """Return the score of VLMEvalKit: questions and right answers of each dimension."""
    is_right = yes_or_no(answer) is (row["truth"] == "yes")
    return [
        int(SPLITS[row["type"]][0] == dimension and counts)
        for dimension in DIMENSIONS
        for counts in (True, is_right)
    ]


def mean_accuracy(counts: Array) -> Mapping[str, Array]:
    """Return the mean of the accuracies of the dimensions that there are, in percent."""
    totals, rights = counts[..., ::2], counts[..., 1::2]
    accuracies = 100 * rights / totals  # NaN where there is no question
    return {"accuracy": np.nansum(accuracies, axis=-1) / np.count_nonzero(totals, axis=-1)}


def rounded(values: Array) -> Array:
    """Return values with one decimal, as Python rounds each."""
    return np.vectorize(lambda value: round(float(value), 1), otypes=[np.float64])(values)


def _splits(task: str, row: Row) -> tuple[str, ...]:
    return ("all", *SPLITS[row["type"]])


AMBER_ANSWERS = AnswerFormat(
    ("id", "response"), "response", lambda record: str(record["id"]), lambda row: row["id"]
)

AMBER_DISCRIMINATIVE = Benchmark(
    name="amber-discriminative",
    title="AMBER discriminative",
    layouts=[
        Layout({"amber-discriminative": (QUESTIONS,)}, read_questions),
        Layout({"amber-discriminative": (f"query/{QUESTIONS}",)}, read_questions),
    ],
    rules={
        "official": Rule(
            counts_of(official_word),
            official_metrics(),
            split_metrics={
                "attribute": official_metrics(starts=3),
                "existence": official_metrics(epsilon=0.001),
            },
            unit="percent",
            units={"accuracy": of_items(lambda scores: scores[1], 100)},
            says_yes=lambda answer: official_word(answer) is True,
            strips=False,
            note="No is the positive class. Only answers that are exactly Yes or No count. F1 is "
            "computed from rounded precision and recall.",
        ),
        "vlmevalkit": Rule(
            right_by_dimension,
            mean_accuracy,
            unit="percent",
            says_yes=lambda answer: yes_or_no(answer) is True,
            note="The accuracy of `all` is the mean of those of attribute, existence and relation.",
        ),
    },
    table=[
        TableRow("amber-discriminative", rule, metric, f"AMBER discriminative, {label}", scale=1)
        for rule, metric, label in (
            ("official", "accuracy", "accuracy of answers that are exactly Yes or No"),
            ("official", "f1", "F1 of answers that are exactly No"),
            ("vlmevalkit", "accuracy", "mean accuracy of the words yes and no"),
        )
    ],
    prompts={
        "official": Prompt(),
        "vlmevalkit": Prompt(lambda row: f"{row['text']}\nPlease answer yes or no."),
    },
    image_folder="amber",
    splits=_splits,
    headline=("accuracy", "f1"),
    version_keys=("id", "image", "text", "type", "truth"),
    versions={"6bb6111800188396": "534babf"},
    answer_formats=[AMBER_ANSWERS],
    constants={"yes": "Yes", "no": "No"},
)
