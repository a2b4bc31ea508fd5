"""The tasks of lmms-eval whose data this project reads: how a row becomes a question of lmms-eval,
and how an answer of lmms-eval is matched to its row.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from realign.evaluation.benchmark import Record
from realign.evaluation.benchmarks import hallusionbench, mme
from realign.evaluation.rows import Row

PREFIX = "realign_"  # begins the names of the tasks that this project writes


@dataclass(frozen=True, eq=False)
class LmmsTask:
    """One task of lmms-eval, and the rows of this project that correspond to its questions."""

    name: str
    """The name in lmms-eval, such as ``pope_adv``."""
    benchmark: str
    file: str
    """The YAML file of the task below ``lmms_eval/tasks``."""
    split: str
    """The split of the data set from which the task reads its questions."""
    document: Callable[[Row], Mapping[str, Any]]
    """Return the fields of a question that lmms-eval reads, except its image."""
    sample_key: Callable[[Record], str | None]
    """Return the key of the question of a line of lmms-eval's answers, or None."""
    row_keys: Callable[[Row], Sequence[str]]
    """Return the keys by which a line may name a row."""
    tasks: tuple[str, ...] = ()
    """This project's tasks that the lmms-eval task covers; empty for all of the benchmark."""
    settings: Mapping[str, Any] = field(default_factory=dict)
    """Settings to override in the YAML file."""
    covers: Callable[[Row], bool] = lambda row: True
    """Return whether the task asks about a row."""
    question: Callable[[Row], str] = lambda row: row["text"]
    """Return the text that the prompt of a row must contain."""
    metrics: Mapping[str, tuple[str, str]] = field(default_factory=dict)
    """Metric of lmms-eval to split and metric under this project's rule ``lmms-eval``."""
    part_of: str = ""
    """A larger task that includes these questions; the two are not run together."""

    def rows(self, tasks: Mapping[str, Sequence[Row]]) -> list[Row]:
        """Return the rows that the task asks about, in its order."""
        names = self.tasks or tuple(tasks)
        return [row for name in names for row in tasks.get(name, ()) if self.covers(row)]


def _in_metric(record: Record, metric: str, key: str) -> str | None:
    """Return a value of a metric of one answer that is an object; None for other metrics."""
    value = record.get(metric)
    found = value.get(key) if isinstance(value, dict) else None
    return str(found) if isinstance(found, str | int) else None


def _pope(name: str, split: str) -> LmmsTask:
    def document(row: Row) -> dict[str, Any]:
        return {
            "id": row["id"],
            "question_id": row["id"],
            "question": row["text"],
            "answer": row["label"],
            "image_source": Path(row["image"]).stem,
            "category": split,
        }

    return LmmsTask(
        name=name,
        benchmark="pope",
        file=f"pope/{name}.yaml",
        split=split,
        document=document,
        sample_key=lambda record: _in_metric(record, "pope_accuracy", "question_id"),
        # the data set on the hub numbers the questions of each split by themselves
        row_keys=lambda row: (row["id"], row["id"].removeprefix(f"{split}-")),
        tasks=(f"pope_{split}",),
        metrics={
            "pope_accuracy": (split, "accuracy"),
            "pope_precision": (split, "precision"),
            "pope_recall": (split, "recall"),
            "pope_f1_score": (split, "f1"),
            "pope_yes_ratio": (split, "yes_ratio"),
        },
    )


def _mme_document(row: Row) -> dict[str, Any]:
    return {
        "question_id": row["image"],  # two questions about one image have the same
        "question": row["text"],
        "answer": row["label"].capitalize(),
        "category": row["task"],
    }


def _mme_sample_key(record: Record) -> str | None:
    for metric in ("mme_perception_score", "mme_cognition_score"):
        task = _in_metric(record, metric, "category")
        image = _in_metric(record, metric, "question_id")
        if task is not None and image is not None:
            return _joined(mme.question_key(task, image, record["input"]))
    return None


def _joined(key: Sequence[str]) -> str:
    return "\n".join(key)


def _without_request(row: Row) -> str:
    return str(row["text"]).replace("Please answer yes or no.", "").strip()


def _scienceqa_document(row: Row) -> dict[str, Any]:
    choices = [*row["choices"].values()]
    return {
        "hint": "",  # the question of a row holds it
        "question": _before_choices(row),
        "choices": choices,
        "answer": [*row["choices"]].index(row["label"]),
    }


def _before_choices(row: Row) -> str:
    return str(row["text"]).split("\nA. ")[0]


def _vqa_document(number: Callable[[Row], str]) -> Callable[[Row], dict[str, Any]]:
    def document(row: Row) -> dict[str, Any]:
        return {
            "question_id": number(row),
            "question": row["text"],
            "answers": list(row["references"]),
        }

    return document


def _hallusionbench_key(record: Record) -> str | None:
    values = record.get("aAcc")
    return hallusionbench.question_id(values) if isinstance(values, dict) else None


def _hallusionbench_document(row: Row) -> dict[str, Any]:
    return {key: row.get(key) for key in (*hallusionbench.KEYS, "gt_answer_details")}


TASKS: tuple[LmmsTask, ...] = (
    _pope("pope_random", "random"),
    _pope("pope_pop", "popular"),
    _pope("pope_adv", "adversarial"),
    LmmsTask(
        name="mme",
        benchmark="mme",
        file="mme/mme.yaml",
        split="test",
        document=_mme_document,
        sample_key=_mme_sample_key,
        row_keys=lambda row: (_joined(row["key"]),),
        question=_without_request,
        metrics={
            "mme_perception_score": ("perception", "score"),
            "mme_cognition_score": ("cognition", "score"),
        },
    ),
    LmmsTask(
        name="scienceqa",
        benchmark="scienceqa",
        file="scienceqa/scienceqa.yaml",
        split="test",
        document=_scienceqa_document,
        sample_key=lambda record: None,
        row_keys=lambda row: (),
        question=_before_choices,
        metrics={"exact_match": ("all", "accuracy")},
    ),
    LmmsTask(
        name="scienceqa_img",
        benchmark="scienceqa",
        file="scienceqa/scienceqa_img.yaml",
        split="test",
        document=_scienceqa_document,
        sample_key=lambda record: None,
        row_keys=lambda row: (),
        question=_before_choices,
        covers=lambda row: row["has_image"],
        metrics={"exact_match": ("all", "image_accuracy")},
        part_of="scienceqa",
    ),
    LmmsTask(
        name="textvqa_val",
        benchmark="textvqa",
        file="textvqa/textvqa_val.yaml",
        split="validation",
        document=_vqa_document(lambda row: row["id"]),
        sample_key=lambda record: _in_metric(record, "submission", "question_id"),
        row_keys=lambda row: (row["id"],),
        metrics={"exact_match": ("all", "accuracy")},
    ),
    LmmsTask(
        name="vizwiz_vqa_val",
        benchmark="vizwiz",
        file="vizwiz_vqa/vizwiz_vqa_val.yaml",
        split="val",
        document=_vqa_document(lambda row: Path(row["image"]).stem),
        sample_key=lambda record: _in_metric(record, "submission", "image"),
        row_keys=lambda row: (row["image"],),
        metrics={"exact_match": ("all", "accuracy")},
    ),
    LmmsTask(
        name="hallusion_bench_image",
        benchmark="hallusionbench",
        file="hallusion_bench/hallusion_bench_image.yaml",
        split="image",
        document=_hallusionbench_document,
        sample_key=_hallusionbench_key,
        row_keys=lambda row: (row["id"],),
        # its metrics ask a judge over the network, and take an unreachable one for an unclear
        # verdict; without them the answers are stored and judged afterwards
        settings={"metric_list": []},
        covers=lambda row: row["image"] is not None,
    ),
)


def task_named(name: str) -> LmmsTask | None:
    """Return the task with a name, with or without :data:`PREFIX`; None for an unknown name."""
    known = {task.name: task for task in TASKS}
    return known.get(name.removeprefix(PREFIX))
