"""MMHal-Bench: 96 open questions of eight types, whose answers a judge rates from 0 to 6."""

from __future__ import annotations

import re
from collections.abc import Mapping
from contextlib import suppress
from pathlib import Path
from typing import Any

import numpy as np

from realign.errors import RefusedError
from realign.evaluation.benchmark import (
    AnswerFormat,
    Array,
    Benchmark,
    Layout,
    Prompt,
    Record,
    Rule,
    of_items,
)
from realign.evaluation.judging import (
    Judge,
    Judging,
    Replies,
    Reply,
    constant,
    parsed,
    required,
    stored_replies,
)
from realign.evaluation.rows import Key, Row, check_row, read_records
from realign.runtime.strict_json import read_json

FILES = ("response_template.json", "mmhal-bench_answer_template.json")
RATINGS = range(7)
LOWEST_WITHOUT_HALLUCINATION = 3
TYPES = (
    *("attribute", "adversarial", "comparison", "counting"),
    *("relation", "environment", "holistic", "other"),
)
REVIEW = "gpt4_review"  # how RLAIF-V calls the reply in its merged file

_FOLLOWED = re.compile(r"rating: [0-6](?:\d|\.\d)")
_STRING = Key(lambda value: isinstance(value, str), "be a string", "Put it into quotes.")
KEYS = {
    "image_id": _STRING,
    "question": _STRING,
    "question_type": Key(
        lambda value: value in TYPES, f"be one of {', '.join(TYPES)}", "Take the published file."
    ),
}


def read(path: Path) -> list[Row]:
    """Read the published list, whose answers are empty."""
    rows = []
    records = read_records(path)
    for position, (where, record) in enumerate(records):
        row = check_row(record, where, KEYS)
        row |= {"id": row["image_id"], "image": row["image_id"], "text": row["question"]}
        rows.append({**row, "position": (position, len(records))})
    return rows


def read_judge_responses(path: Path) -> list[tuple[str, Record]] | None:
    """Read the judge's responses as the published script stores them, one per question in order;
    None for any other file.
    """
    if path.suffix != ".json" or not path.is_file():
        return None
    values: Any = None
    with suppress(RefusedError):  # JSON lines, or nothing that another reader takes
        values = read_json(path)
    if not isinstance(values, list) or not all(_is_response(value) for value in values):
        return None
    return [
        (f"{path.name}, entry {i + 1}", {**value, "position": (i, len(values))})
        for i, value in enumerate(values)
    ]


def _is_response(value: object) -> bool:
    return isinstance(value, dict) and isinstance(value.get("choices"), list)


def replies(record: Record) -> Replies:
    """Return the reply in a response of a judge, that of RLAIF-V, or this project's.

    Raises:
        RefusedError: A response holds no text.
    """
    if "choices" in record:
        try:
            content = record["choices"][0]["message"]["content"]
        except (LookupError, TypeError):
            content = None
        if not isinstance(content, str):
            raise RefusedError(
                f"a judge's response must have choices[0].message.content, got "
                f"{record['choices']!r:.80}. Take the file that the judge's script wrote."
            )
        model = record.get("model")
        return [Reply(content, model if isinstance(model, str) else None)]
    if isinstance(record.get(REVIEW), str):
        return [Reply(record[REVIEW])]
    return stored_replies(record)


def rating(reply: str) -> str | None:
    """Return the rating that the official script finds; None where it finds none or several."""
    found = [str(value) for value in RATINGS if f"rating: {value}" in reply.lower()]
    return found[0] if len(found) == 1 else None


def strict_rating(reply: str) -> str | None:
    """Return the rating, but none that is the beginning of another number."""
    return None if _FOLLOWED.search(reply.lower()) else rating(reply)


def judged(row: Row, verdict: str) -> list[int]:
    """Return one answer, its rating and whether that means a hallucination."""
    return [1, int(verdict), int(int(verdict) < LOWEST_WITHOUT_HALLUCINATION)]


def metrics(sums: Array) -> Mapping[str, Array]:
    """Return the mean rating and the share of answers with a hallucination."""
    total, ratings, hallucinated = np.moveaxis(sums, -1, 0)
    return {"mean_score": ratings / total, "hallucination_rate": hallucinated / total}


def judge_values(row: Row, answer: str) -> dict[str, str]:
    """Return the texts for the judge's prompt."""
    contents = row.get("image_content")
    if not isinstance(contents, list) or not all(isinstance(word, str) for word in contents):
        raise RefusedError(
            f"{row['where']} requires image_content, a list of words that the judge is shown, got "
            f"{contents!r:.40}. Take the published file."
        )
    return {
        "contents": ", ".join(contents),
        "question": row["question"],
        "reference": required(row, "gt_answer"),
        "answer": answer,
    }


UNITS = {
    "mean_score": of_items(lambda scores: scores[1]),
    "hallucination_rate": of_items(lambda scores: scores[2]),
}
_UNIT = "mean_score is of 0 to 6 points, hallucination_rate a fraction (ratings below 3)."

MMHAL = Benchmark(
    name="mmhal",
    title="MMHal-Bench",
    layouts=[Layout({"mmhal": (name,)}, read) for name in FILES],
    rules={
        "official": Rule(
            judged,
            metrics,
            unit="points",
            units=UNITS,
            judging=Judging(parsed(rating), constant("0"), constant("6"), fault=constant("0")),
            note=f"{_UNIT} If the published script finds no rating in a reply, or several, the "
            "rating is 0, which counts as a hallucination.",
        ),
        "strict": Rule(
            judged,
            metrics,
            unit="points",
            units=UNITS,
            judging=Judging(parsed(strict_rating), constant("0"), constant("6")),
            note=f"{_UNIT} An answer is unjudged unless the reply has exactly one whole rating.",
        ),
    },
    table=[],
    less_is_better=("hallucination_rate",),
    prompts={"official": Prompt(max_new_tokens=1024)},
    image_places=lambda row: (row["image"], f"{row['image']}.jpg", f"{row['image']}.png"),
    cluster="id",
    splits=lambda task, row: ("all", row["question_type"]),
    version_keys=("image_id", "question", "question_type"),
    versions={"3df1decac49afc21": "83d917b"},  # of the repository of RLAIF-V
    answer_reader=read_judge_responses,
    answer_formats=[
        AnswerFormat(
            ("image_id", "question", "model_answer"),
            "model_answer",
            lambda record: (record["image_id"], record["question"]),
            lambda row: (row["image_id"], row["question"]),
        ),
        AnswerFormat(
            (),
            None,
            lambda record: record["position"],
            lambda row: row["position"],
            reply_fields=("choices", "position"),
        ),
    ],
    replies=replies,
    judge=Judge(
        placeholders=("contents", "question", "reference", "answer"),
        values=judge_values,
        rule="official",
        temperature=0.0,
        max_tokens=None,
        temperature_step=0.5,
    ),
)
