"""HallusionBench: yes/no questions about figures and about edited copies of them, in groups."""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping, Sequence
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
    Prompt,
    Record,
    Rule,
    ScoredRow,
    TableRow,
    UnitValues,
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

FILE = "HallusionBench.json"
VERDICT = "gpt4v_output_gpt_check"  # how the official script calls the judge's verdict
WRONG, RIGHT, UNCLEAR = 0, 1, 2  # verdicts of the judge

_WORDS = re.compile(r"\b(?:in)?correct\b|\bunclear\b", re.IGNORECASE)
_DENIED = re.compile(r"(?:\bnot|n't)\s+(?:\w+\s+)?(?:in)?correct\b", re.IGNORECASE)
_STRING = Key(lambda value: isinstance(value, str), "be a string", "Put it into quotes.")
_GROUP = ("category", "subcategory", "set_id", "figure_id", "question_id")
KEYS = {
    **dict.fromkeys(_GROUP, _STRING),
    "visual_input": Key(
        lambda value: value in ("0", "1", "2"), 'be "0", "1" or "2"', "Take the published file."
    ),
    "question": _STRING,
    "gt_answer": Key(lambda value: value in ("0", "1"), 'be "0" or "1"', "Correct it."),
    "filename": Key(
        lambda value: value is None or isinstance(value, str), "be null or a file name", "Fix it."
    ),
}


def read(path: Path) -> list[Row]:
    """Read the published list of questions; those without an image have None there."""
    rows = []
    for where, record in read_records(path):
        row = check_row(record, where, KEYS)
        row["text"], row["image"] = row["question"], row["filename"]
        row["id"] = question_id(row)
        row["set"] = "_".join(row[key] for key in ("category", "subcategory", "set_id"))
        row["merged_set"] = "_".join(row[key] for key in ("subcategory", "set_id"))
        row["may_be_unclear"] = row["category"] == "VS" and row["figure_id"] == "0"
        rows.append(row)
    return rows


def question_id(record: Mapping[str, Any]) -> str:
    return "_".join(str(record.get(key)) for key in _GROUP)


CODE_WORDS = ("incorrect", "correct", "unclear")  # the replies that stand for the codes 0, 1 and 2


def verdict(reply: str) -> str | None:
    """Return the verdict that the official script reads in a judge's reply; None where the reply
    has none of the three words, which the script takes for unclear.
    """
    lower = reply.lower()
    if "incorrect" in lower:
        return str(WRONG)
    if "correct" in lower:
        return str(RIGHT)
    return str(UNCLEAR) if "unclear" in lower else None


def strict_verdict(reply: str) -> str | None:
    """Return the verdict if the reply has exactly one of the three words, and it is not denied."""
    words = {word.lower() for word in _WORDS.findall(reply)}
    if len(words) != 1 or _DENIED.search(reply):
        return None
    return str(CODE_WORDS.index(words.pop()))


def replies(record: Record) -> Replies:
    """Return the stored reply, or the one that a verdict of the official script stands for.

    Raises:
        RefusedError: The verdict is none of the three.
    """
    stored = stored_replies(record)
    if stored or record.get(VERDICT) is None:
        return stored
    code = str(record[VERDICT])
    if code not in ("0", "1", "2"):
        question = question_id(record) if "id" not in record else record["id"]
        raise RefusedError(
            f"{VERDICT} must be 0, 1 or 2, the verdict of a judge, question {question} has "
            f"{record[VERDICT]!r:.40}. Correct it, or remove the field."
        )
    return [Reply(CODE_WORDS[int(code)])]


def judge_values(row: Row, answer: str) -> dict[str, str]:
    """Return the texts for the judge's prompt."""
    reference = required(row, "gt_answer_details")
    return {"question": row["question"], "reference": reference, "answer": answer}


def judged(row: Row, verdict: str) -> list[int]:
    """Score a verdict; unclear is right for a question without a figure."""
    right = int(verdict) == RIGHT or (int(verdict) == UNCLEAR and row["may_be_unclear"])
    return [int(right)]


def judged_strictly(row: Row, verdict: str) -> list[int]:
    """Score a verdict as lmms-eval does, which asks about figures alone."""
    return [int(int(verdict) == RIGHT)]


def exact(row: Row, answer: str) -> list[int]:
    """Score the word yes or no; neither is unclear."""
    reading = yes_or_no(answer)
    verdict = UNCLEAR if reading is None else int(reading == (row["gt_answer"] == "1"))
    return judged(row, str(verdict))


def word(row: Row, answer: str) -> list[int]:
    """Score the word yes or no as VLMEvalKit does; neither is wrong."""
    return [int(yes_or_no(answer) is (row["gt_answer"] == "1"))]


def has_yes(row: Row, answer: str) -> list[int]:
    """Score whether an answer contains "yes" anywhere, by a rule that lmms-eval has but does not
    use.
    """
    return [int(("yes" in answer.lower()) == (row["gt_answer"] == "1"))]


_KINDS = ("aacc", "facc", "qacc", "easy", "hard")
_IMAGE_KINDS = _KINDS[:3]  # which other programs have
_Groups = Callable[[Sequence[ScoredRow]], list[list[bool]]]


def groups(*, counts_figure: Callable[[Row], bool], set_key: str) -> _Groups:
    """Return, for each kind of group (questions, figures, question pairs, easy pairs and hard
    pairs), which of the groups of a set of questions are wholly right.
    """

    def find(rows: Sequence[ScoredRow]) -> list[list[bool]]:
        found: list[dict[Any, list[bool]]] = [{} for _ in _KINDS]
        for row, (right,) in rows:
            kinds = [
                (0, row["id"]),
                (2, row["question_id"]),
                (4, row["question_id"]) if row["visual_input"] == "2" else (3, row["question_id"]),
            ]
            if counts_figure(row):
                kinds.append((1, row["figure_id"]))
            for kind, key in kinds:
                found[kind].setdefault((row[set_key], key), []).append(bool(right))
        return [[all(rights) for rights in kind.values()] for kind in found]

    return find


def group_counts(find: _Groups) -> Callable[[Sequence[ScoredRow]], list[int]]:
    """Return the score vector of a set of questions: for each kind of group the number of groups,
    and the number of those in which every answer is right.
    """
    return lambda rows: [number for kind in find(rows) for number in (len(kind), sum(kind))]


def group_units(find: _Groups, kinds: Sequence[str] = _KINDS) -> dict[str, UnitValues]:
    """Return the groups of each metric, which is the share of right ones."""

    def of_kind(place: int) -> UnitValues:
        return UnitValues(lambda rows: [float(right) for right in find(rows)[place]], 100)

    return {name: of_kind(_KINDS.index(name)) for name in kinds}


def group_metrics(counts: Array) -> Mapping[str, Array]:
    """Return the share of questions, figures and pairs that are wholly right, in percent."""
    totals, rights = counts[..., ::2], counts[..., 1::2]
    shares = np.moveaxis(np.round(100 * rights / totals, 4), -1, 0)
    return dict(zip(_KINDS, shares, strict=True))


def image_metrics(counts: Array) -> Mapping[str, Array]:
    """Return the three metrics that other programs have."""
    metrics = group_metrics(counts)
    return {name: metrics[name] for name in _IMAGE_KINDS}


def _image_places(row: Row) -> tuple[str, str]:
    name = row["image"].removeprefix("./")
    return name, f"hallusion_bench/{name}"


def _has_image(row: Row) -> bool:
    return row["image"] is not None


_OFFICIAL = groups(counts_figure=lambda row: not row["may_be_unclear"], set_key="set")
_ALL_FIGURES = groups(counts_figure=lambda row: True, set_key="set")
_MERGED_SETS = groups(counts_figure=lambda row: True, set_key="merged_set")
_PAIRS = (
    "easy and hard are shares of question pairs of which all answers are right, not of "
    "questions; easy also contains questions about original figures."
)
_FIELDS = (*_GROUP, "model_prediction")
_BOUNDS: Any = {"worst": constant(str(WRONG)), "best": constant(str(RIGHT))}

HALLUSIONBENCH = Benchmark(
    name="hallusionbench",
    title="HallusionBench",
    layouts=[Layout({"hallusionbench": (FILE,)}, read)],
    rules={
        "official": Rule(
            judged,
            group_metrics,
            combine=group_counts(_OFFICIAL),
            units=group_units(_OFFICIAL),
            unit="percent",
            judging=Judging(parsed(verdict), **_BOUNDS, fault=constant(str(UNCLEAR))),
            note="Reads a judge's replies as the published script does: incorrect anywhere in a "
            "reply counts first, then correct, so `not correct` is right. A reply with neither is "
            f"unclear. {_PAIRS}",
        ),
        "strict": Rule(
            judged,
            group_metrics,
            combine=group_counts(_OFFICIAL),
            units=group_units(_OFFICIAL),
            unit="percent",
            judging=Judging(parsed(strict_verdict), **_BOUNDS),
            note="As official, but an answer is unjudged unless the reply has exactly one of the "
            f"words correct, incorrect and unclear, and does not negate it. {_PAIRS}",
        ),
        "exact": Rule(
            exact,
            group_metrics,
            combine=group_counts(_OFFICIAL),
            units=group_units(_OFFICIAL),
            unit="percent",
            says_yes=lambda answer: yes_or_no(answer) is True,
            note="Reads the words yes and no instead of asking a judge, so its numbers cannot be "
            f"compared with the published tables. {_PAIRS}",
        ),
        "lmms-eval": Rule(
            judged_strictly,
            image_metrics,
            combine=group_counts(_ALL_FIGURES),
            units=group_units(_ALL_FIGURES, _IMAGE_KINDS),
            unit="percent",
            covers=_has_image,
            judging=Judging(parsed(verdict), **_BOUNDS, fault=constant(str(UNCLEAR))),
            note="Reads a judge's replies, for questions with an image only. A reply without a "
            "verdict is unclear, which counts as wrong. lmms-eval itself repeats the previous "
            "verdict if its judge cannot be reached.",
        ),
        "lmms-eval-intern": Rule(
            has_yes,
            image_metrics,
            combine=group_counts(_ALL_FIGURES),
            units=group_units(_ALL_FIGURES, _IMAGE_KINDS),
            unit="percent",
            covers=_has_image,
            says_yes=lambda answer: "yes" in answer.lower(),
            note="An answer that contains the letters yes counts as yes, and any other as no. "
            "lmms-eval has this rule, but does not use it.",
        ),
        "vlmevalkit": Rule(
            word,
            image_metrics,
            combine=group_counts(_MERGED_SETS),
            units=group_units(_MERGED_SETS, _IMAGE_KINDS),
            cluster="merged_set",
            unit="percent",
            covers=_has_image,
            says_yes=lambda answer: yes_or_no(answer) is True,
            note="Questions with an image only. Sets of VD and VS that have the same subcategory "
            "and number are one set in the split `all`.",
        ),
    },
    table=[
        TableRow(
            "hallusionbench",
            "exact",
            metric,
            f"HallusionBench without a judge, {label}",
            is_headline=metric == "qacc",
            scale=1,
            undefined="there is no such question",
        )
        for metric, label in (
            ("aacc", "questions"),
            ("facc", "figures"),
            ("qacc", "question pairs"),
            ("easy", "easy pairs"),
            ("hard", "hard pairs"),
        )
    ],
    prompts={
        "official": Prompt(max_new_tokens=1024),
        "lmms-eval": Prompt(max_new_tokens=128),
        "vlmevalkit": Prompt(max_new_tokens=1024),
    },
    image_places=_image_places,
    cluster="set",
    splits=lambda task, row: ("all", row["category"]),
    version_keys=(*_GROUP, "visual_input", "question", "gt_answer", "filename"),
    versions={"013085538019ce9e": "744007c"},
    answer_formats=[
        AnswerFormat(
            # an id may be that of another question in another release
            ("question", *_FIELDS),
            "model_prediction",
            lambda record: (question_id(record), record["question"]),
            lambda row: (row["id"], row["question"]),
        ),
        AnswerFormat(_FIELDS, "model_prediction", question_id, lambda row: row["id"]),
    ],
    constants={"yes": "Yes", "no": "No"},
    replies=replies,
    judge=Judge(
        placeholders=("question", "reference", "answer"),
        values=judge_values,
        rule="official",
        temperature=1.0,  # the published script sets none, and this is what OpenAI then takes
        max_tokens=None,
    ),
)
