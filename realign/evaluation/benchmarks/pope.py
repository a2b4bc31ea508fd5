"""POPE: yes/no questions about objects, half of them absent (random, popular, adversarial)."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from pathlib import Path

import numpy as np

from realign.evaluation.answer_words import yes_or_no
from realign.evaluation.benchmark import (
    AnswerFormat,
    Array,
    Benchmark,
    Layout,
    Prompt,
    Record,
    Rule,
    TableRow,
    View,
    of_items,
)
from realign.evaluation.prompt_texts import SHORT_ANSWER
from realign.evaluation.rows import Key, Row, read_rows

SPLITS = ("random", "popular", "adversarial")
LABEL = Key(lambda label: label in ("yes", "no"), "be yes or no", "Correct it or remove the line.")

# LLaVA numbers its copy of the questions of all splits in one file
LLAVA_FIRST_ID = {"adversarial": 1, "random": 10_000_001, "popular": 20_000_001}

# rows_digest of image, text and label of every published split
VERSIONS = {
    "old": ("3d80b74a67afe102", "941f411ac3194f6e", "49e51ec30442f5bd"),
    "7ef3026": ("5d01387f682d9956", "f85a23ea0115bd36", "d375b74ab53fadb6"),
    "HEAD": ("5ec17945fed33c32", "4509f7279c54e389", "50c056a5306c0a26", "3178b9c3201e31cd"),
    "aokvqa": ("dbb9f1d82d018d0a", "5cdf273cdd78491c", "8620d99577732718"),
    "gqa": ("9796009949f7c992", "9ec7e30697c222b0", "53e7bdce62758513"),
}


def read(path: Path) -> list[Row]:
    """Read the questions of one split, as POPE publishes them or in this project's lines."""
    split = next(name for name in SPLITS if name in path.name)
    rows = read_rows(path, label=LABEL)
    for number, row in enumerate(rows):
        row["id"] = f"{split}-{row.get('question_id', number + 1)}"
        row["llava_id"] = LLAVA_FIRST_ID[split] + number
    return rows


def official_yes(answer: str) -> bool:
    """Return whether an answer says yes by the official rule: none of the words of its first
    sentence is No, not or no.
    """
    words = answer.split(".")[0].replace(",", "").split(" ")
    return not {"No", "not", "no"} & set(words)


def exact_word(answer: str) -> bool | None:
    """Return whether a whole answer is yes or no, as lmms-eval does; None for any other."""
    return {"yes": True, "no": False}.get(answer.lower().strip())


def counts_of(parse: Callable[[str], bool | None]) -> Callable[[Row, str], list[int]]:
    """Return the score of a rule: labels yes read as yes, no and neither, then labels no."""

    def score(row: Row, answer: str) -> list[int]:
        reading = parse(answer)
        cells = [(label, reading) for label in ("yes", "no") for reading in (True, False, None)]
        return [int((row["label"], reading) == cell) for cell in cells]

    return score


def official_metrics(counts: Array) -> Mapping[str, Array]:
    """Return accuracy, precision, recall, F1 of yes and the rate of yes, and balanced accuracy."""
    tp, fn, _, fp, tn, _ = np.moveaxis(counts, -1, 0)
    return _metrics(tp, fp, tn, fn, total=counts.sum(-1), said_yes=tp + fp)


def lmms_metrics(counts: Array) -> Mapping[str, Array]:
    """Return lmms-eval's metrics: precision and recall leave out answers that are neither yes nor
    no, and its rate of yes is that of the labels.
    """
    tp, fn, other_yes, fp, tn, _ = np.moveaxis(counts, -1, 0)
    said_yes = tp + fn + other_yes
    return _undefined_as_0(_metrics(tp, fp, tn, fn, total=counts.sum(-1), said_yes=said_yes))


def vlmevalkit_metrics(counts: Array) -> Mapping[str, Array]:
    """Return VLMEvalKit's metrics, in percent: an answer that is neither is wrong, and counts as no
    in precision and recall.
    """
    tp, fn, other_yes, fp, tn, other_no = np.moveaxis(counts, -1, 0)
    total = counts.sum(-1)
    metrics = _metrics(tp, fp, tn + other_no, fn + other_yes, total=total, said_yes=tp + fp)
    metrics = _undefined_as_0(metrics)
    metrics["accuracy"] = (tp + tn) / total
    plain = ("tp", "fp", "tn", "fn")
    return {name: value if name in plain else 100 * value for name, value in metrics.items()}


def _undefined_as_0(metrics: dict[str, Array]) -> dict[str, Array]:
    """Return metrics with 0 for a precision, recall or F1 whose denominator is 0, as lmms-eval and
    VLMEvalKit have it.
    """
    zeroed = {name: np.nan_to_num(metrics[name]) for name in ("precision", "recall", "f1")}
    return metrics | zeroed


def _metrics(
    tp: Array, fp: Array, tn: Array, fn: Array, *, total: Array, said_yes: Array
) -> dict[str, Array]:
    precision, recall = tp / (tp + fp), tp / (tp + fn)
    return {
        "accuracy": (tp + tn) / total,
        "precision": precision,
        "recall": recall,
        "f1": 2 * tp / (2 * tp + fp + fn),
        "balanced_accuracy": 0.5 * (recall + tn / (tn + fp)),
        "yes_ratio": said_yes / total,
        "tp": tp,
        "fp": fp,
        "tn": tn,
        "fn": fn,
    }


def show(row: Row, answer: str) -> View:
    """Judge an answer by the official rule."""
    return View(f"right answer: {row['label']}", official_yes(answer) == (row["label"] == "yes"))


def _is_right(scores: Sequence[float]) -> float:
    return scores[0] + scores[4]  # yes that is read as yes, and no as no


def _llava_key(record: Record) -> tuple[object, str]:
    # the prompt is the question, and a line that asks for a short answer
    return record["question_id"], str(record["prompt"]).split("\n")[0]


def _short(row: Row) -> str:
    return f"{row['text']}{SHORT_ANSWER}"


def _layout(pattern: str) -> Layout:
    return Layout({f"pope_{split}": (pattern.format(split),) for split in SPLITS}, read)


POPE = Benchmark(
    name="pope",
    title="POPE",
    layouts=[
        _layout("pope_{}.jsonl"),
        _layout("coco_pope_{}.json"),
        _layout("aokvqa_pope_seem_{}.json"),
        _layout("gqa_pope_seem_{}.json"),
    ],
    rules={
        "official": Rule(
            counts_of(official_yes),
            official_metrics,
            units={"accuracy": of_items(_is_right)},
            says_yes=official_yes,
            note="An answer without the word No, not or no in its first sentence counts as yes, "
            "even an empty one. The published script scores each split separately; `all` pools "
            "them.",
        ),
        "lmms-eval": Rule(
            counts_of(exact_word),
            lmms_metrics,
            units={"accuracy": of_items(_is_right)},
            says_yes=lambda answer: exact_word(answer) is True,
            note="The whole answer must be yes or no. The metric yes_ratio is that of the labels, "
            "like pope_yes_ratio of lmms-eval. Precision, recall and F1 are 0 where they are not "
            "defined.",
        ),
        "vlmevalkit": Rule(
            counts_of(yes_or_no),
            vlmevalkit_metrics,
            units={"accuracy": of_items(_is_right, 100)},
            unit="percent",
            says_yes=lambda answer: yes_or_no(answer) is True,
            note="An answer that is neither yes nor no counts as wrong in the accuracy, and as no "
            "in precision, recall and F1, which are 0 where they are not defined.",
        ),
    },
    table=[
        TableRow(
            f"pope_{split}",
            "official",
            metric,
            f"POPE {split}, {label}",
            is_headline=is_headline,
            undefined=undefined,
            split=split,
        )
        for metric, label, is_headline, undefined in (
            ("accuracy", "accuracy", True, "there is no question"),
            (
                "balanced_accuracy",
                "balanced accuracy",
                False,
                "all questions have one right answer",
            ),
            ("f1", "F1", False, "yes is neither said nor right"),
        )
        for split in SPLITS
    ],
    prompts={
        "official": Prompt(),
        "llava": Prompt(_short),
        "lmms-eval": Prompt(_short),
        "vlmevalkit": Prompt(),
    },
    image_places=lambda row: (row["image"], f"val2014/{row['image']}"),
    samples={"pope_adversarial": show},
    splits=lambda task, row: (task.removeprefix("pope_"), "all"),
    means={"mean": SPLITS},
    headline=("accuracy", "f1"),
    version_keys=("image", "text", "label"),
    versions={digest: name for name, digests in VERSIONS.items() for digest in digests},
    answer_formats=[
        AnswerFormat(
            ("question_id", "prompt", "text"),  # LLaVA's
            "text",
            _llava_key,
            lambda row: (row["llava_id"], row["text"]),
        ),
        AnswerFormat(
            ("question", "answer"),  # POPE's own
            "answer",
            lambda record: str(record["question"]).strip().lower(),
            lambda row: row["text"].strip().lower(),
            is_in_order=True,
        ),
    ],
    constants={"yes": "Yes", "no": "No"},
)
