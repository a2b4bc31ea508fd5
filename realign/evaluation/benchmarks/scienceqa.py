"""ScienceQA: multiple-choice questions of schools, about half of them with an image."""

from __future__ import annotations

import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np

from realign.errors import RefusedError
from realign.evaluation.answer_letters import llava_letter, vlmevalkit_letter
from realign.evaluation.benchmark import (
    AnswerFormat,
    Array,
    Benchmark,
    Layout,
    Prompt,
    Rule,
    TableRow,
    UnitValues,
    of_items,
)
from realign.evaluation.prompt_texts import LETTER, list_choices, vlmevalkit_choices
from realign.evaluation.rows import Key, Row, check_row, read_member, read_records
from realign.runtime.strict_json import read_json

PROBLEMS, SPLITS = "problems.json", "pid_splits.json"
QUESTIONS = "llava_test_CQM-A.json"
LETTERS = "ABCDE"
# a choice may have several lines
_CHOICE = re.compile(r"^([A-E])\. (.*?)(?=\n[A-E]\. |\Z)", re.MULTILINE | re.DOTALL)

_TAKE = "Take the published file."
_TURNS = Key(
    lambda value: (
        isinstance(value, list)
        and len(value) == 2
        and all(isinstance(turn, dict) and isinstance(turn.get("value"), str) for turn in value)
    ),
    "be a question and an answer, each with a string as value",
    _TAKE,
)
_CHOICES = Key(
    lambda value: (
        isinstance(value, list)
        and 2 <= len(value) <= len(LETTERS)
        and all(isinstance(choice, str) for choice in value)
    ),
    "be a list of two to five strings",
    _TAKE,
)
_STRING = Key(lambda value: isinstance(value, str), "be a string", _TAKE)
_IMAGE = Key(lambda value: value is None or isinstance(value, str), "be null or a file name", _TAKE)
_INDEX = Key(
    lambda value: type(value) is int and 0 <= value < len(LETTERS),
    "be the index of a choice",
    _TAKE,
)


def read_problems(path: Path) -> list[Row]:
    """Read the test split of the published problems.

    Raises:
        RefusedError: The file of splits is missing, or a problem of the split is.
    """
    splits = path.with_name(SPLITS)
    if not splits.is_file():
        raise RefusedError(f"data requires {SPLITS} beside {PROBLEMS}, got none. Add it.")
    problems = read_json(path)
    if not isinstance(problems, dict):
        raise RefusedError(
            f"{path} must be a JSON object, got a {type(problems).__name__}. {_TAKE}"
        )
    rows = []
    for pid in read_member(splits, "test"):
        if not isinstance(pid, str) or pid not in problems:
            raise RefusedError(f"{path} must hold problem {pid!r:.40} of the test split. {_TAKE}")
        keys = {"question": _STRING, "choices": _CHOICES, "answer": _INDEX}
        row = _check(problems[pid], f"{path.name}, problem {pid}", keys)
        if row["answer"] >= len(row["choices"]):
            raise RefusedError(
                f"{row['where']}: answer must be the index of a choice, got {row['answer']} of "
                f"{len(row['choices'])}. {_TAKE}"
            )
        image = f"{pid}/{row['image']}" if row["image"] else None
        hint = str(row.get("hint") or "")
        choices = dict(zip(LETTERS, row["choices"], strict=False))
        context = f"Context: {hint}\n" if hint else ""
        text = f"{context}{row['question']}\n{list_choices(choices)}"
        label = LETTERS[row["answer"]]
        parts = {"question": row["question"], "hint": hint}
        rows.append(_row(pid, image, text, choices, label, row["where"]) | parts)
    return rows


def read_questions(path: Path) -> list[Row]:
    """Read LLaVA's list of questions, which holds the right letters."""
    rows = []
    for where, record in read_records(path):
        row = _check(record, where, {"id": _STRING, "conversations": _TURNS})
        question, answer = (turn["value"] for turn in row["conversations"])
        text = question.replace("<image>", "").strip()
        choices = dict(_CHOICE.findall(text))
        if answer not in choices:
            raise RefusedError(
                f"{where}: the answer must be the letter of a choice, got {answer!r:.40}. {_TAKE}"
            )
        rows.append(_row(row["id"], row["image"], text, choices, answer, where))
    return rows


def _check(record: Any, where: str, keys: Mapping[str, Key]) -> Row:
    """Check a record, whose image may be left out."""
    if isinstance(record, dict):
        record = {"image": None, **record}
    return check_row(record, where, {**keys, "image": _IMAGE})


def _row(
    number: str, image: str | None, text: str, choices: Mapping[str, str], label: str, where: str
) -> Row:
    return {
        "id": str(number),
        "image": image,
        "text": text,
        "choices": {letter: choice.strip() for letter, choice in choices.items()},
        "label": label,
        "has_image": image is not None,
        "where": where,
    }


def _llava_prompt(row: Row) -> str:
    return f"{row['text']}{LETTER}"


def _vlmevalkit_prompt(row: Row) -> str:
    if "question" not in row:
        raise RefusedError(
            f"data requires {PROBLEMS} for the prompt vlmevalkit, got {QUESTIONS}, in which the "
            "hint and the question are one text. Add that file, or name another --prompt."
        )
    return vlmevalkit_choices(row["question"], row["choices"], row["hint"])


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


def _units(scale: float) -> dict[str, UnitValues]:
    return {
        "accuracy": of_items(lambda scores: scores[1], scale),
        "image_accuracy": UnitValues(
            lambda rows: [float(scores[1]) for row, scores in rows if row["has_image"]], scale
        ),
    }


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
            units=_units(100),
            note="LLaVA's script reads three forms: A alone, A. followed by a space, and exactly "
            "The answer is A. It counts (A), a and B. as wrong.",
        ),
        "lmms-eval": Rule(
            lmms,
            fractions,
            units=_units(1),
            note="A letter of any case, or one before a period.",
        ),
        "vlmevalkit": Rule(
            vlmevalkit,
            fractions,
            units=_units(1),
            note="A letter among the last words, or the text of exactly one choice.",
        ),
    },
    table=[
        TableRow(
            "scienceqa",
            "official",
            metric,
            f"ScienceQA, accuracy of {label}",
            is_headline=metric == "accuracy",
            scale=1,
            undefined="no question has an image",
        )
        for metric, label in (
            ("accuracy", "all questions"),
            ("image_accuracy", "questions with an image"),
        )
    ],
    prompts={
        "llava": Prompt(_llava_prompt, 1024),
        "lmms-eval": Prompt(_llava_prompt, 16),
        "vlmevalkit": Prompt(_vlmevalkit_prompt, 1024),
    },
    image_places=lambda row: (row["image"], f"test/{row['image']}"),
    cluster="id",
    version_keys=("id", "label", "has_image", "choices"),
    versions={"41f8ae49161c2fd3": "test"},
    answer_formats=[
        AnswerFormat(("question_id", "text"), "text", _question_id, lambda row: row["id"]),
        AnswerFormat(("question_id", "pred"), "pred", _question_id, lambda row: row["id"]),
    ],
    constants={letter: letter for letter in "AB"},
)
