"""ScienceQA: multiple-choice questions of schools, about half of them with an image."""

from __future__ import annotations

import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np

from realign.errors import RefusedError
from realign.evaluation.answer_letters import llava_letter, vlmevalkit_letter
from realign.evaluation.benchmark import AnswerFormat, Array, Benchmark, Layout, Rule
from realign.evaluation.rows import Key, Row, check_row, read_records
from realign.runtime.strict_json import read_json

PROBLEMS, SPLITS = "problems.json", "pid_splits.json"
QUESTIONS = "llava_test_CQM-A.json"
LETTERS = "ABCDE"
_CHOICE = re.compile(r"^([A-E])\. (.*)$", re.MULTILINE)
_SUFFIX = "Answer with the option's letter from the given choices directly."

_CHOICES = Key(
    lambda value: isinstance(value, list) and 2 <= len(value) <= len(LETTERS),
    "be a list of two to five strings",
    "Take the published file.",
)
_STRING = Key(lambda value: isinstance(value, str), "be a string", "Take the published file.")
_INDEX = Key(
    lambda value: isinstance(value, int) and 0 <= value < len(LETTERS),
    "be the index of a choice",
    "Take the published file.",
)


def read_problems(path: Path) -> list[Row]:
    """Read the test split of the published problems.

    Raises:
        RefusedError: The file of splits is missing, or a problem of the split is.
    """
    splits = path.with_name(SPLITS)
    if not splits.is_file():
        raise RefusedError(f"data requires {SPLITS} beside {PROBLEMS}, got none. Add it.")
    problems, numbers = read_json(path), read_json(splits)
    rows = []
    for pid in numbers["test"]:
        if pid not in problems:
            raise RefusedError(f"{path} must hold problem {pid} of the test split. Download again.")
        keys = {"question": _STRING, "choices": _CHOICES, "answer": _INDEX}
        row = check_row(problems[pid], f"{path.name}, problem {pid}", keys)
        image = f"{pid}/{row['image']}" if row.get("image") else None
        hint = f"Context: {row['hint']}\n" if row.get("hint") else ""
        choices = dict(zip(LETTERS, row["choices"], strict=False))
        listed = "\n".join(f"{letter}. {choice}" for letter, choice in choices.items())
        text = f"{hint}{row['question']}\n{listed}\n{_SUFFIX}"
        label = LETTERS[row["answer"]]
        rows.append(_row(pid, image, text, choices, label, row["where"]))
    return rows


def read_questions(path: Path) -> list[Row]:
    """Read LLaVA's list of questions, which holds the right letters."""
    rows = []
    for where, record in read_records(path):
        question, answer = (turn["value"] for turn in record["conversations"])
        text = question.replace("<image>", "").strip()
        rows.append(
            _row(
                record["id"], record.get("image"), text, dict(_CHOICE.findall(text)), answer, where
            )
        )
    return rows


def _row(
    number: str, image: str | None, text: str, choices: Mapping[str, str], label: str, where: str
) -> Row:
    return {
        "id": str(number),
        "image": image,
        "text": text,
        "choices": dict(choices),
        "label": label,
        "has_image": image is not None,
        "cluster": str(number),
        "where": where,
    }


def official(row: Row, answer: str) -> list[int]:
    """Score the letter that LLaVA's script finds; a letter of no choice is wrong."""
    return _counts(row, llava_letter(answer) == row["label"])


def lmms(row: Row, answer: str) -> list[int]:
    """Score the whole answer as a letter of any case, or a capital letter before a period."""
    is_right = answer.lower() == row["label"].lower()
    if not is_right and len(answer) >= 2 and answer[0].isupper() and answer[1] == ".":
        is_right = answer[0] == row["label"]
    return _counts(row, is_right)


def vlmevalkit(row: Row, answer: str) -> list[int]:
    """Score the letter or the choice that VLMEvalKit finds."""
    return _counts(row, vlmevalkit_letter(answer, row["choices"]) == row["label"])


def _counts(row: Row, is_right: bool) -> list[int]:
    return [1, int(is_right), int(row["has_image"]), int(is_right and row["has_image"])]


def fractions(counts: Array) -> Mapping[str, Array]:
    """Return the accuracy over all questions and over those with an image."""
    total, right, images, right_images = np.moveaxis(counts, -1, 0)
    return {"accuracy": right / total, "image_accuracy": right_images / images}


def percents(counts: Array) -> Mapping[str, Array]:
    """Return the same in percent."""
    return {name: 100 * value for name, value in fractions(counts).items()}


def _question_id(record: Mapping[str, Any]) -> str:
    return str(record["question_id"])


SCIENCEQA = Benchmark(
    name="scienceqa",
    title="ScienceQA",
    layouts=[
        Layout({"scienceqa": (PROBLEMS, SPLITS)}, read_problems),
        Layout({"scienceqa": (QUESTIONS,)}, read_questions),
    ],
    rules={
        "official": Rule(
            official,
            percents,
            unit="percent",
            note="LLaVA's script: A, or A. with a space behind it, or The answer is A. to the "
            "letter; (A), a and B. are wrong.",
        ),
        "lmms-eval": Rule(lmms, fractions, note="A letter of any case, or one before a period."),
        "vlmevalkit": Rule(
            vlmevalkit,
            fractions,
            note="A letter among the last words, or the text of exactly one choice.",
        ),
    },
    table=[],
    cluster="cluster",
    version_keys=("id", "label", "has_image"),
    versions={"44ff3cf5fdca4ddf": "test"},
    answer_formats=[
        AnswerFormat(("question_id", "text"), "text", _question_id, lambda row: row["id"]),
        AnswerFormat(("question_id", "pred"), "pred", _question_id, lambda row: row["id"]),
    ],
    constants={letter: letter for letter in "AB"},
)
