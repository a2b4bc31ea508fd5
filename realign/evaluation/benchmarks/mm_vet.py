"""MM-Vet: 218 open questions, each of which takes several of six abilities; a judge grades the
answers from 0 to 1.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping
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
from realign.evaluation.rows import TEXT, Key, Row, check_row, read_rows
from realign.runtime.strict_json import read_json

FILE = "mm-vet.json"
LLAVA_FILE = "llava-mm-vet.jsonl"  # the questions without the abilities
CAPABILITIES = ("rec", "ocr", "know", "gen", "spat", "math")
_ID = re.compile(r"v\d+_\d+")
_IN_GROUND_TRUTH = re.compile("<(?:AND|OR)>")

_STRING = Key(lambda value: isinstance(value, str), "be a string", "Put it into quotes.")
KEYS = {
    "imagename": _STRING,
    "question": TEXT,
    "answer": _STRING,
    "capability": Key(
        lambda value: (
            isinstance(value, list) and value != [] and all(one in CAPABILITIES for one in value)
        ),
        f"be a list of {', '.join(CAPABILITIES)}",
        "Take the published file.",
    ),
}
_NUMBER = Key(
    lambda value: isinstance(value, int) and not isinstance(value, bool),
    "be a whole number",
    "Take the published file.",
)


def read(path: Path) -> list[Row]:
    """Read the published object of questions by id."""
    content = read_json(path)
    if not isinstance(content, dict) or not content:
        raise RefusedError(
            f"{path} must be a JSON object of questions by id, got {content!r:.80}. Take the "
            "published file."
        )
    rows = []
    for name, record in content.items():
        row = check_row(record, f"{path.name}, {name}", KEYS)
        row |= {"id": name, "image": row["imagename"], "text": row["question"]}
        rows.append({**row, "reference": row["answer"]})
    return rows


def read_llava(path: Path) -> list[Row]:
    """Read the questions as LLaVA has them, of which only the score of all can be had."""
    rows = read_rows(path, question_id=_NUMBER)
    return [
        {**row, "id": f"v1_{row['question_id']}", "question": row["text"], "capability": []}
        for row in rows
    ]


def splits(task: str, row: Row) -> tuple[str, ...]:
    """Return all, every ability that a question takes, and the combination of them."""
    own = [name for name in CAPABILITIES if name in row["capability"]]
    together = "+".join(own) if len(own) > 1 else f"{''.join(own)} only"
    return ("all", *own, together) if own else ("all",)


def read_by_id(path: Path) -> list[tuple[str, Record]] | None:
    """Read an object of answers or of grades by id; None for any other file."""
    if path.suffix != ".json" or not path.is_file():
        return None
    content: Any = None
    with suppress(RefusedError):  # JSON lines, or nothing that another reader takes
        content = read_json(path)
    if not isinstance(content, dict) or not content or not all(map(_ID.fullmatch, content)):
        return None
    return [
        (f"{path.name}, {name}", {"id": name, "answer": value})
        if isinstance(value, str)
        else (f"{path.name}, {name}", {"id": name, "grade": value})
        for name, value in content.items()
    ]


def replies(record: Record) -> Replies:
    """Return the replies in a published grade, one for each run, or ours.

    Raises:
        RefusedError: A grade has another form.
    """
    if "grade" not in record:
        return stored_replies(record)
    grade = record["grade"]
    columns = [grade.get(name) if isinstance(grade, dict) else None for name in _COLUMNS]
    models, contents, scores = (column if isinstance(column, list) else [] for column in columns)
    if not scores or not all(isinstance(score, float | int) for score in scores):
        raise RefusedError(
            f"a grade must be an object whose score is a list of numbers, with content and model "
            f"beside it, got {grade!r:.80}. Take the file that the grader wrote."
        )
    found = []
    for k, score in enumerate(scores):
        content = contents[k] if k < len(contents) else None
        model = models[k] if k < len(models) else None
        found.append(
            Reply(
                content if isinstance(content, str) else str(score),
                model if isinstance(model, str) else None,
            )
        )
    return found


_COLUMNS = ("model", "content", "score")


def grade(reply: str) -> str | None:
    """Return the grade that the official script reads: the text before the first space."""
    return whole_grade(reply.split(" ")[0])


def stripped_grade(reply: str) -> str | None:
    """Return the grade that lmms-eval reads: the same without white space around the reply."""
    return grade(reply.strip())


def whole_grade(reply: str) -> str | None:
    """Return the grade if the whole reply is a number from 0 to 1."""
    try:
        value = float(reply)
    except ValueError:
        return None
    return repr(value) if 0 <= value <= 1 else None


def fault_of_lmms_eval(reply: str) -> str | None:
    """Return 0 for a reply that is not a number; lmms-eval asks endlessly about other numbers."""
    with suppress(ValueError):
        float(reply.strip().split(" ")[0])
        return None
    return "0.0"


def judged(row: Row, verdict: str) -> list[float]:
    """Return one answer and its grade."""
    return [1, float(verdict)]


def metrics(sums: Array) -> Mapping[str, Array]:
    """Return the mean grade, times 100."""
    total, grades = np.moveaxis(sums, -1, 0)
    return {"score": 100 * grades / total}


def judge_values(row: Row, answer: str) -> dict[str, str]:
    """Return the texts for the judge's prompt; the tags of the reference are between spaces."""
    reference = _IN_GROUND_TRUTH.sub(lambda tag: f" {tag[0]} ", required(row, "reference"))
    return {"question": row["question"], "reference": reference, "answer": answer}


def _rule(
    verdict: Callable[[str], str | None], fault: Callable[[str], str | None], note: str
) -> Rule:
    judging = Judging(parsed(verdict), constant("0.0"), constant("1.0"), fault)
    note = f"The mean grade of 0 to 1, times 100. {note}"
    units = {"score": of_items(lambda scores: scores[1], 100)}
    return Rule(judged, metrics, unit="points", units=units, judging=judging, note=note)


MM_VET = Benchmark(
    name="mm-vet",
    title="MM-Vet",
    layouts=[
        Layout({"mm-vet": (FILE,)}, read),
        Layout({"mm-vet": (LLAVA_FILE,)}, read_llava),
    ],
    rules={
        "official": _rule(
            grade,
            constant("0.0"),
            "If the first word of a reply is not a number from 0 to 1, the grade is 0, which the "
            "published script gives after five tries.",
        ),
        "strict": _rule(
            grade,
            lambda reply: None,
            "An answer is unjudged unless the first word of the reply is a number from 0 to 1.",
        ),
        "lmms-eval": _rule(
            stripped_grade,
            fault_of_lmms_eval,
            "If the first word of a reply is not a number, the grade is 0. If it is above 1, "
            "lmms-eval would ask forever; here the answer is unjudged.",
        ),
        "vlmevalkit": _rule(
            whole_grade,
            constant("0.0"),
            "If a reply is not exactly a number from 0 to 1, the grade is 0, which VLMEvalKit "
            "gives after five tries.",
        ),
    },
    table=[],
    prompts={"official": Prompt(max_new_tokens=1024)},
    image_places=lambda row: (row["image"], f"images/{row['image']}"),
    cluster="id",
    splits=splits,
    version_keys=("id", "question", "capability"),
    answer_reader=read_by_id,
    answer_formats=[
        AnswerFormat(
            ("question_id", "text"),
            "text",
            lambda record: f"v1_{record['question_id']}",
            lambda row: row["id"],
        ),
        AnswerFormat(
            ("id",),
            None,
            lambda record: str(record["id"]),
            lambda row: row["id"],
            reply_fields=("grade",),
        ),
    ],
    replies=replies,
    judge=Judge(
        placeholders=("question", "reference", "answer"),
        values=judge_values,
        rule="official",
        temperature=0.0,
        max_tokens=3,
        tries=5,
        temperature_step=0.5,
        reminder="\nThe grade, as a number alone: ",
    ),
)
