"""MMBench (EN dev): multiple-choice questions, each asked with every rotation of its choices."""

from __future__ import annotations

import binascii
import hashlib
from base64 import b64decode
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path

import numpy as np

from realign.errors import RefusedError
from realign.evaluation.answer_letters import (
    NO_LETTER,
    lmms_letter,
    names_no_choice,
    vlmevalkit_letter,
)
from realign.evaluation.benchmark import (
    AnswerFormat,
    Array,
    Benchmark,
    Layout,
    Prompt,
    Rule,
    ScoredRow,
    TableRow,
    UnitValues,
)
from realign.evaluation.judging import Judge, Judging
from realign.evaluation.prompt_texts import LETTER, list_choices, vlmevalkit_choices
from realign.evaluation.rows import Row, read_table

FILES = ("mmbench_dev_20230712.tsv", "mmbench_dev_20231003.tsv", "MMBench_DEV_EN.tsv")
ROTATION = 1_000_000  # what is added to the index of a question at each rotation
LETTERS = "ABCD"
_LONGEST_INDEX = 64  # a shorter value in place of an image is the index of the row that has it
_NONE = ("", "nan", "NaN", "none", "None")


def read(path: Path) -> list[Row]:
    """Read the published table. Images are not kept; a row has the index of the first row with its
    image as the image's name.
    """
    rows: list[Row] = []
    images: dict[str, str] = {}
    for where, record in read_table(path):
        try:
            index, label = int(record["index"]), record["answer"]
            question = record["question"]
        except (KeyError, ValueError) as error:
            raise RefusedError(
                f"{where} must have index, question and answer, got {error}. Take the published "
                "file with the answers of the dev split."
            ) from None
        choices = {
            letter: record[letter]
            for letter in LETTERS
            if record.get(letter, "") not in ("", "nan", "NaN")  # None may be a choice
        }
        if label not in choices:
            raise RefusedError(
                f"{where}: answer must be one of {', '.join(choices)}, got {label!r}. Take the "
                "published file with the answers of the dev split."
            )
        rows.append(
            {
                "id": str(index),
                "group": index % ROTATION,
                "is_rotated": index >= ROTATION,
                "image": _image_name(record, images),
                "text": question,
                "hint": "" if record.get("hint", "") in _NONE else record["hint"],
                "choices": choices,
                "label": label,
                "kinds": [record[name] for name in ("l2-category", "category") if record.get(name)],
                "where": where,
            }
        )
    names = {row["id"]: row["image"] for row in rows}
    for row in rows:  # of which another row has the image
        row["image"] = names.get(row["image"], row["image"])
    return rows


def read_images(path: Path) -> Iterator[tuple[str, bytes]]:
    """Yield the name of each image of the table and its file, each once; one that is not in
    base64 as it stands there.
    """
    images: dict[str, str] = {}
    for _, record in read_table(path):
        num_images, name = len(images), _image_name(record, images)
        if len(images) > num_images:
            try:
                yield name, b64decode(record["image"], validate=True)
            except (binascii.Error, ValueError):
                yield name, record["image"].encode()


def _image_name(record: Mapping[str, str], images: dict[str, str]) -> str:
    """Return the name of a record's image; a new one is added to the names by content."""
    image = record.get("image", "")
    if not image:
        return str(int(record["index"]) % ROTATION)
    if len(image) <= _LONGEST_INDEX:
        return image
    return images.setdefault(hashlib.sha256(image.encode()).hexdigest(), str(int(record["index"])))


def _llava_prompt(row: Row) -> str:
    hint = f"{row['hint']}\n" if row["hint"] else ""
    return f"{hint}{row['text']}\n{list_choices(row['choices'])}{LETTER}"


def _lmms_prompt(row: Row) -> str:
    hint = f"{row['hint']} " if row["hint"] else ""
    choices = list_choices(row["choices"])
    return f"{hint}{row['text']} There are several options:\n{choices}{LETTER}"


def is_right(row: Row, answer: str) -> list[int]:
    """Score the letter or the choice that is found without a judge."""
    return [int(vlmevalkit_letter(answer, row["choices"]) == row["label"])]


def is_right_by_lmms(row: Row, answer: str) -> list[int]:
    """Score the letter that lmms-eval finds without a judge."""
    return [int(lmms_letter(answer, row["choices"]) == row["label"])]


def letter(row: Row, reply: str) -> str | None:
    """Return the letter that a judge names, or Z where it says that the answer is no choice."""
    found = vlmevalkit_letter(reply, row["choices"])
    return found if found != NO_LETTER or names_no_choice(reply) else None


def judge_values(row: Row, answer: str) -> dict[str, str]:
    """Return the texts for the judge's prompt."""
    options = "\n".join(f"{name}. {choice}" for name, choice in row["choices"].items())
    return {"question": row["text"], "options": options, "answer": answer}


def group_counts(rows: Sequence[ScoredRow]) -> list[int]:
    """Return groups, groups with every rotation right, and questions not rotated and right ones."""
    plain = _plain(rows)
    return [1, int(all(right for _, (right,) in rows)), len(plain), int(sum(plain))]


def _plain(rows: Sequence[ScoredRow]) -> list[float]:
    return [right for row, (right,) in rows if not row["is_rotated"]]


def units(scale: float) -> dict[str, UnitValues]:
    """Return the units of both accuracies: groups, and questions that are not rotated."""
    return {
        "circular_accuracy": UnitValues(lambda rows: [float(group_counts(rows)[1])], scale),
        "accuracy": UnitValues(_plain, scale),
    }


def metrics(scale: float) -> Callable[[Array], Mapping[str, Array]]:
    """Return the two accuracies, times a scale."""

    def of_counts(counts: Array) -> Mapping[str, Array]:
        groups, whole, plain, right = np.moveaxis(counts, -1, 0)
        return {"circular_accuracy": scale * whole / groups, "accuracy": scale * right / plain}

    return of_counts


_NOTE = (
    "A question is right if the answers to all of its rotations are right. An answer with neither "
    "a letter nor the text of one choice is wrong; the published tables ask a judge about it."
)

MMBENCH = Benchmark(
    name="mmbench",
    title="MMBench",
    layouts=[Layout({"mmbench": (file,)}, read) for file in FILES],
    rules={
        "official": Rule(
            is_right,
            metrics(100),
            combine=group_counts,
            unit="percent",
            units=units(100),
            note=_NOTE,
        ),
        "vlmevalkit": Rule(is_right, metrics(1), combine=group_counts, units=units(1), note=_NOTE),
        "lmms-eval": Rule(
            is_right_by_lmms,
            metrics(100),
            combine=group_counts,
            unit="percent",
            units=units(100),
            note="The task mmbench_en_dev_static, which has only circular_accuracy. If no letter "
            "stands alone and no choice is quoted, it takes the likeliest capital letter of the "
            "answer, even one inside a word. The task mmbench_en_dev asks a judge.",
        ),
        "judged": Rule(
            is_right,
            metrics(100),
            combine=group_counts,
            unit="percent",
            units=units(100),
            judging=Judging(
                letter,
                worst=lambda row: NO_LETTER,
                best=lambda row: row["label"],
                asks_about=lambda row, answer: (
                    vlmevalkit_letter(answer, row["choices"]) == NO_LETTER
                ),
            ),
            note="As official, but if an answer has neither a letter nor the text of one choice, a "
            "judge names the choice. If the judge names none, the answer is unjudged; the "
            "published programs draw a random choice for it.",
        ),
    },
    table=[
        TableRow(
            "mmbench",
            "official",
            metric,
            f"MMBench without a judge, {label}",
            is_headline=metric == "circular_accuracy",
            scale=1,
            undefined="there is no such question",
        )
        for metric, label in (
            ("circular_accuracy", "questions right in every rotation"),
            ("accuracy", "questions not rotated"),
        )
    ],
    prompts={
        "llava": Prompt(_llava_prompt, 1024),
        "lmms-eval": Prompt(_lmms_prompt, 1024),
        "vlmevalkit": Prompt(
            lambda row: vlmevalkit_choices(row["text"], row["choices"], row["hint"]), 1024
        ),
    },
    read_images=read_images,
    cluster="group",
    splits=lambda task, row: ("all", *dict.fromkeys(row["kinds"])),
    version_keys=("id", "text", "choices", "label"),
    answer_formats=[
        AnswerFormat(
            ("question_id", "text"),
            "text",
            lambda record: str(record["question_id"]),
            lambda row: row["id"],
        ),
        AnswerFormat(
            ("index", "prediction"),
            "prediction",
            lambda record: str(record["index"]),
            lambda row: row["id"],
        ),
    ],
    constants={name: name for name in "AB"},
    judge=Judge(
        placeholders=("question", "options", "answer"),
        values=judge_values,
        rule="judged",
        temperature=0.0,
        max_tokens=None,
        temperature_step=0.5,
    ),
)
