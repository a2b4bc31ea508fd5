"""LLaVA-Bench (in the wild): 60 open questions; a judge scores the answers of GPT-4 and of the
model together, from 1 to 10.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping, Sequence
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
from realign.evaluation.rows import Key, Row, read_records, read_rows
from realign.runtime.strict_json import read_json

FILE = "questions.jsonl"
CONTEXT = "context.jsonl"
REFERENCES = "answers_gpt4.jsonl"
RULES = "rule.json"
CATEGORIES = ("conv", "detail", "complex")
PREFIX = "llava_bench_"  # of a category in reviews and rules
FAILED = "-1 -1"  # what the published script stores where it finds no two scores

_NUMBER = re.compile(r"-?\d+(?:\.\d+)?")
_CATEGORY = Key(
    lambda value: value in CATEGORIES, f"be one of {', '.join(CATEGORIES)}", "Correct it."
)
_ID = Key(
    lambda value: isinstance(value, str | int) and not isinstance(value, bool),
    "be a number or a string",
    "Take the published file.",
)


def read(path: Path) -> list[Row]:
    """Read the published questions and, from the files beside them, the texts for a judge."""
    rows = read_rows(path, question_id=_ID, category=_CATEGORY)
    contexts = _by(path.with_name(CONTEXT), "image")
    references = _by(path.with_name(REFERENCES), "question_id")
    rules = _rules(path.with_name(RULES))
    for row in rows:
        row["id"] = str(row["question_id"])
        caption = contexts.get(row["image"], {}).get("caption")
        row["context"] = "\n".join(map(str, caption)) if isinstance(caption, list) else caption
        row["reference"] = references.get(row["id"], {}).get("text")
        row["rule"] = rules.get(row["category"])
    return rows


def _by(path: Path, key: str) -> dict[str, Mapping[str, Any]]:
    """Return the records of a file by one of their values; none without a file."""
    if not path.exists():
        return {}
    found: dict[str, Mapping[str, Any]] = {}
    for where, record in read_records(path):
        if not isinstance(record, dict) or key not in record:
            raise RefusedError(
                f"{where} must be an object with {key}, got {record!r:.80}. Take the published "
                "file."
            )
        found[str(record[key])] = record
    return found


def _rules(path: Path) -> dict[str, str]:
    """Return the judge's instructions by category from the file of rules; none without a file."""
    if not path.exists():
        return {}
    if not path.is_file():
        raise RefusedError(f"{path} must be a file, got none. Put the published file there.")
    content, found = read_json(path), {}
    for category in CATEGORIES:
        rule = content.get(f"{PREFIX}{category}") if isinstance(content, dict) else None
        if not isinstance(rule, dict) or not isinstance(rule.get("prompt"), str):
            raise RefusedError(
                f"{path} must have a prompt under {PREFIX}{category}, got {rule!r:.80}. Take the "
                "published file, or remove this one."
            )
        found[category] = rule["prompt"]
    return found


def replies(record: Record) -> Replies:
    """Return the reply in a published review, or ours.

    Raises:
        RefusedError: A review holds neither a reply nor two scores.
    """
    if "tuple" not in record:
        return stored_replies(record)
    content, pair = record.get("content"), record["tuple"]
    if isinstance(content, str):
        return [Reply(content)]
    if not isinstance(pair, list) or not all(isinstance(one, float | int) for one in pair):
        raise RefusedError(
            f"a review must have a reply as content or two scores as tuple, got {pair!r:.80}. Take "
            "the file that the reviewing script wrote."
        )
    return [Reply(" ".join(map(str, pair)))]


def official_scores(reply: str) -> str | None:
    """Return the two numbers that the official script reads in the first line; None where the line
    is anything else.
    """
    pieces = reply.split("\n")[0].replace(",", " ").split(" ")
    return _pair(pieces) if len(pieces) == 2 else None


def first_numbers(reply: str) -> str | None:
    """Return the first two numbers of the first line, as lmms-eval reads a reply."""
    found = _NUMBER.findall(reply.strip().split("\n")[0])
    return _pair(found[:2]) if len(found) >= 2 else None


def strict_scores(reply: str) -> str | None:
    """Return the two numbers of the first line if both are from 1 to 10."""
    found = official_scores(reply)
    return found if found and all(1 <= float(one) <= 10 for one in found.split()) else None


def _pair(texts: Sequence[str]) -> str | None:
    try:
        pair = [float(text) for text in texts]
    except ValueError:
        return None
    if not all(np.isfinite(pair)) or pair == [-1, -1]:
        return None
    return f"{pair[0]!r} {pair[1]!r}"


def judged(row: Row, verdict: str) -> list[float]:
    """Return one answer, the score of GPT-4's and its own."""
    return [1, *map(float, verdict.split())]


def rounded_metrics(sums: Array) -> Mapping[str, Array]:
    """Return the ratio of the mean scores in percent, rounded as the published script does: the
    means to three decimals, the ratio to one.
    """
    total, reference, model = np.moveaxis(sums, -1, 0)
    ratio = _rounded(model / total, 3) / _rounded(reference / total, 3)
    return {"relative_score": _rounded(ratio * 100, 1)}


def metrics(sums: Array) -> Mapping[str, Array]:
    """Return the ratio of the mean scores in percent."""
    total, reference, model = np.moveaxis(sums, -1, 0)
    return {"relative_score": (model / total) / (reference / total) * 100}


def _rounded(values: Array, decimals: int) -> Array:
    # numpy rounds a multiple of the value, and so another way where that is a half
    return np.vectorize(lambda value: round(float(value), decimals), otypes=[np.float64])(values)


def judge_values(row: Row, answer: str) -> dict[str, str]:
    """Return the texts for the judge's prompt, without a rule if the data has none."""
    shown = {
        "context": required(row, "context"),
        "question": row["text"],
        "reference": required(row, "reference"),
        "answer": answer,
    }
    return shown | ({"rule": row["rule"]} if row["rule"] else {})


def _rule(
    scores: Callable[[str], str | None], of: Callable[[Array], Mapping[str, Array]], note: str
) -> Rule:
    fault = constant(FAILED) if scores is not strict_scores else lambda reply: None
    judging = Judging(parsed(scores), constant("10 1"), constant("1 10"), fault)
    note = f"The mean score of the answers in percent of that of GPT-4's answers. {note}"
    return Rule(judged, of, unit="percent", judging=judging, note=note)


_FAULT = "a reply without them scores -1 and -1, which the means include"

LLAVA_BENCH = Benchmark(
    name="llava-bench",
    title="LLaVA-Bench (in the wild)",
    layouts=[Layout({"llava-bench": (FILE,)}, read)],
    rules={
        "official": _rule(
            official_scores,
            rounded_metrics,
            f"The first line must be two numbers and nothing else; {_FAULT}.",
        ),
        "strict": _rule(
            strict_scores,
            rounded_metrics,
            "An answer is unjudged unless the first line of the reply is two numbers from 1 to 10 "
            "and nothing else.",
        ),
        "lmms-eval": _rule(
            first_numbers,
            rounded_metrics,
            "Reads the first two numbers of the first line, so `Assistant 1: 8, Assistant 2: 9` "
            f"scores 1 and 8; {_FAULT}.",
        ),
        "vlmevalkit": _rule(
            official_scores,
            metrics,
            f"The first line must be two numbers and nothing else; {_FAULT}. Not rounded.",
        ),
    },
    table=[],
    prompts={"official": Prompt(max_new_tokens=1024)},
    image_places=lambda row: (row["image"], f"images/{row['image']}"),
    cluster="id",
    splits=lambda task, row: ("all", row["category"]),
    version_keys=("id", "text", "category"),
    answer_formats=[
        AnswerFormat(
            ("question_id",),
            None,
            lambda record: str(record["question_id"]),
            lambda row: row["id"],
            reply_fields=("tuple",),
        ),
        AnswerFormat(
            ("question_id", "text"),
            "text",
            lambda record: str(record["question_id"]),
            lambda row: row["id"],
        ),
    ],
    replies=replies,
    judge=Judge(
        placeholders=("context", "question", "reference", "answer", "rule"),
        values=judge_values,
        rule="official",
        temperature=0.2,
        max_tokens=1024,
    ),
)
