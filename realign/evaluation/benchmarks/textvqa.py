"""TextVQA (validation 0.5.1) and VizWiz-VQA: questions with the answers of ten people each."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from functools import cache
from pathlib import Path
from typing import Any

from realign.errors import RefusedError
from realign.evaluation.benchmark import (
    AnswerFormat,
    Array,
    Benchmark,
    Layout,
    Prompt,
    Record,
    Rule,
    TableRow,
    UnitValues,
    of_items,
)
from realign.evaluation.prompt_texts import SHORT_ANSWER
from realign.evaluation.rows import Key, Row, check_row, read_member, read_records
from realign.evaluation.vqa_answers import (
    Normalizer,
    official_form,
    soft_accuracy,
    vlmevalkit_form,
)

PEOPLE = 10


def _ten(is_answer: Callable[[Any], bool]) -> Key:
    return Key(
        lambda value: (
            isinstance(value, list) and len(value) == PEOPLE and all(map(is_answer, value))
        ),
        f"be a list of {PEOPLE} answers",
        "Take the published file.",
    )


_TEN = _ten(lambda answer: isinstance(answer, str))
_TEN_OBJECTS = _ten(
    lambda answer: isinstance(answer, dict) and isinstance(answer.get("answer"), str)
)
_STRING = Key(lambda value: isinstance(value, str), "be a string", "Take the published file.")
_OCR_LINE = "Reference OCR token: "
_OCR_FILE = "llava_textvqa_val_v051_ocr.jsonl"
_UNANSWERABLE = "\nWhen the provided information is insufficient, respond with 'Unanswerable'."


def read_textvqa(path: Path) -> list[Row]:
    """Read the published questions with their ten answers and, where LLaVA's file of questions lies
    beside them, its prompts, which hold the tokens of an OCR system.
    """
    rows, prompts = [], _llava_prompts(path.with_name(_OCR_FILE))
    for number, record in enumerate(read_member(path, "data"), start=1):
        keys = {"image_id": _STRING, "question": _STRING, "answers": _TEN}
        row = check_row(record, f"{path.name}, question {number}", keys)
        rows.append(
            {
                "id": str(row.get("question_id", number)),
                "image": f"{row['image_id']}.jpg",
                "image_id": row["image_id"],
                "text": row["question"],
                "references": tuple(row["answers"]),
                "llava_prompt": prompts.get((row["image_id"], row["question"].lower())),
                "where": row["where"],
            }
        )
    return rows


def _llava_prompts(path: Path) -> dict[tuple[str, str], str]:
    if not path.is_file():
        return {}
    keys = {"question_id": _STRING, "text": _STRING}
    records = [check_row(record, where, keys) for where, record in read_records(path)]
    return {
        (record["question_id"], _question(record["text"])): record["text"] for record in records
    }


def _llava_prompt(row: Row) -> str:
    """Return the prompt with OCR tokens.

    Raises:
        RefusedError: LLaVA's file of questions is missing, or lacks this one.
    """
    if row["llava_prompt"] is None:
        raise RefusedError(
            f"{row['where']}: the prompt llava requires the question in {_OCR_FILE}, LLaVA's file "
            "with the tokens of an OCR system, got none. Put that file beside the questions, or "
            "pass --prompt lmms-eval, which has no such tokens."
        )
    return str(row["llava_prompt"])


def read_vizwiz(path: Path) -> list[Row]:
    """Read the published questions of the validation split."""
    rows = []
    for number, (where, record) in enumerate(read_records(path)):
        row = check_row(
            record, where, {"image": _STRING, "question": _STRING, "answers": _TEN_OBJECTS}
        )
        rows.append(
            {
                "id": str(number),
                "image": row["image"],
                "text": row["question"],
                "references": tuple(answer["answer"] for answer in row["answers"]),
                "type": str(row.get("answer_type", "")),
                "where": where,
            }
        )
    return rows


def accuracy_by(form: Normalizer) -> Callable[[Row, str], list[float]]:
    """Return the score of a rule: the share of people who agree, as the benchmark counts it."""
    known = cache(form)

    def score(row: Row, answer: str) -> list[float]:
        references = [known(reference) for reference in row["references"]]
        return [1.0, soft_accuracy(form(answer), references)]

    return score


def _fraction(sums: Array) -> Mapping[str, Array]:
    return {"accuracy": sums[..., 1] / sums[..., 0]}


def _percent(sums: Array) -> Mapping[str, Array]:
    return {"accuracy": 100 * sums[..., 1] / sums[..., 0]}


def _units(scale: float) -> dict[str, UnitValues]:
    return {"accuracy": of_items(lambda scores: scores[1], scale)}


def _question(prompt: str) -> str:
    """Return the question of LLaVA's prompt, in small letters."""
    first, *others = str(prompt).split("\n")
    return (others[0] if first.startswith(_OCR_LINE) and others else first).lower()


def _llava_key(record: Record) -> tuple[str, str]:
    return str(record["question_id"]), _question(record["prompt"])


RULES = {
    "official": Rule(
        accuracy_by(official_form),
        _percent,
        unit="percent",
        units=_units(100),
        note="An answer that three of ten people gave scores 0.9, and that of four scores 1. "
        "Results with and without OCR tokens in the prompt cannot be compared.",
    ),
    "lmms-eval": Rule(
        accuracy_by(official_form),
        _fraction,
        units=_units(1),
        note="Same numbers as official. Its prompt has no OCR tokens by default.",
    ),
    "vlmevalkit": Rule(
        accuracy_by(vlmevalkit_form),
        _percent,
        unit="percent",
        units=_units(100),
        note="Keeps commas, a possessive s, and a period after a digit.",
    ),
}


def _accuracy_row(task: str, title: str) -> TableRow:
    label = f"{title}, accuracy by ten people's answers"
    return TableRow(task, "official", "accuracy", label, is_headline=True, scale=1)


TEXTVQA = Benchmark(
    name="textvqa",
    title="TextVQA",
    layouts=[Layout({"textvqa": ("TextVQA_0.5.1_val.json", _OCR_FILE)}, read_textvqa)],
    rules=RULES,
    table=[_accuracy_row("textvqa", "TextVQA")],
    prompts={
        "llava": Prompt(_llava_prompt),
        "lmms-eval": Prompt(lambda row: f"{row['text'].capitalize()}{SHORT_ANSWER}"),
        "vlmevalkit": Prompt(lambda row: f"{row['text']}{SHORT_ANSWER}"),
    },
    image_places=lambda row: (row["image"], f"train_images/{row['image']}"),
    version_keys=("id", "image", "text", "references"),
    answer_formats=[
        AnswerFormat(
            ("question_id", "prompt", "text"),
            "text",
            _llava_key,
            lambda row: (row["image_id"], row["text"].lower()),
        ),
        AnswerFormat(
            ("question_id", "answer"),
            "answer",
            lambda record: str(record["question_id"]),
            lambda row: row["id"],
        ),
    ],
    constants={"unanswerable": "unanswerable"},
)


def _vizwiz_splits(task: str, row: Mapping[str, Any]) -> tuple[str, ...]:
    return ("all", row["type"]) if row["type"] else ("all",)


VIZWIZ = Benchmark(
    name="vizwiz",
    title="VizWiz-VQA",
    layouts=[Layout({"vizwiz": ("val.json",)}, read_vizwiz)],
    rules=RULES,
    table=[_accuracy_row("vizwiz", "VizWiz-VQA")],
    prompts={
        "llava": Prompt(lambda row: f"{row['text']}{_UNANSWERABLE}{SHORT_ANSWER}"),
        "lmms-eval": Prompt(lambda row: f"{row['text'].capitalize()}{_UNANSWERABLE}{SHORT_ANSWER}"),
        "vlmevalkit": Prompt(),
    },
    image_places=lambda row: (row["image"], f"val/{row['image']}"),
    splits=_vizwiz_splits,
    version_keys=("image", "text", "references"),
    answer_formats=[
        AnswerFormat(
            ("question_id", "prompt", "text"),
            "text",
            _llava_key,
            lambda row: (row["id"], row["text"].split("\n")[0].lower()),
        ),
        AnswerFormat(
            ("image", "answer"), "answer", lambda record: record["image"], lambda row: row["image"]
        ),
    ],
    constants={"unanswerable": "unanswerable"},
)
