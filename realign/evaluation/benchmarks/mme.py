"""MME: two yes/no questions about each image, in fourteen tasks."""

from __future__ import annotations

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
    Metrics,
    Prompt,
    Record,
    Rule,
    ScoredRow,
    TableRow,
    UnitValues,
    of_items,
)
from realign.evaluation.prompt_texts import SHORT_ANSWER
from realign.evaluation.rows import Row
from realign.runtime.files import read_utf8

PERCEPTION = (
    "existence",
    "count",
    "position",
    "color",
    "posters",
    "celebrity",
    "scene",
    "landmark",
    "artwork",
    "OCR",
)
COGNITION = (
    "commonsense_reasoning",
    "numerical_calculation",
    "text_translation",
    "code_reasoning",
)
TASKS = (*PERCEPTION, *COGNITION)
VERSION_2023 = (  # rows_digest of every task
    "7f9f4b7712fbcc0c",
    "d48f308775c49911",
    "e045c612d6857611",
    "1134443627bc2e35",
    "18664f69b0477268",
    "70f9d865c84abc02",
    "13b49b51112a54a7",
    "c4781c71ce78c8b0",
    "49868ec23aa27842",
    "2b35fc10ed35e6bf",
    "efc72b380d073a32",
    "a50fe72db1565a2c",
    "6b751fb29ffba317",
    "b5f088363af65f40",
)
QUESTION_END = "Please answer yes or no."
_WIDTH = 4  # questions, right ones, images, images with both right


def read_lists(path: Path) -> list[Row]:
    """Read one ``task.txt`` of the evaluation tool: image, question and label in columns."""
    rows = []
    for number, line in enumerate(_lines(path), start=1):
        where = f"{path.name}, line {number}"
        columns = line.split("\t")
        if len(columns) < 3:
            raise RefusedError(
                f"{where} must have an image, a question and Yes or No, separated by tabs, got "
                f"{line!r:.80}. Take the published file."
            )
        rows.append(_row(path.stem, columns[0], columns[1], columns[2], where))
    return _check_pairs(rows, path)


def read_folder(path: Path) -> list[Row]:
    """Read the folder of a task, with a text file of two questions for each image."""
    folder = path / "questions_answers_YN" if (path / "questions_answers_YN").is_dir() else path
    images = path / "images" if (path / "images").is_dir() else path
    names = {image.stem: image.name for image in images.iterdir() if image.suffix != ".txt"}
    rows = []
    for file in sorted(folder.glob("*.txt")):
        for number, line in enumerate(_lines(file), start=1):
            where = f"{path.name}/{file.name}, line {number}"
            question, _, label = line.partition("\t")
            image = names.get(file.stem, f"{file.stem}.jpg")
            rows.append(_row(path.name, image, question, label, where))
    return _check_pairs(rows, path)


def _lines(path: Path) -> list[str]:
    # not splitlines(): an answer may hold U+2028 and other characters that it takes for line ends
    lines = read_utf8(path).removeprefix("\ufeff").split("\n")
    return [line for line in lines if line.strip()]


def _row(task: str, image: str, question: str, label: str, where: str) -> Row:
    if label.strip().lower() not in ("yes", "no"):
        raise RefusedError(
            f"{where}: the label must be Yes or No, got {label!r:.40}. Take the published file."
        )
    key = question_key(task, image, question)
    return {
        "id": "/".join(key),
        "task": task,
        "image": f"{task}/{image}",
        "text": question,
        "label": label.strip().lower(),
        "where": where,
        "key": key,
    }


def question_key(task: Any, image: Any, question: Any) -> tuple[str, str, str]:
    """Return the part of a question that is the same in every program's prompt."""
    plain = str(question).split("\n")[0].replace(QUESTION_END, "")
    return str(task), Path(str(image)).stem, " ".join(plain.split())


def _check_pairs(rows: list[Row], path: Path) -> list[Row]:
    counts: dict[str, int] = {}
    for row in rows:
        counts[row["image"]] = counts.get(row["image"], 0) + 1
    if odd := [image for image, count in counts.items() if count != 2]:
        raise RefusedError(
            f"{path} must have two questions for each image, got {counts[odd[0]]} for {odd[0]}. "
            "Take the published files."
        )
    if not rows:
        raise RefusedError(f"{path} must have at least one question, got none. Fill or remove it.")
    return rows


def read_answer_lists(path: Path) -> list[tuple[str, Record]] | None:
    """Read a folder of ``task.txt`` with answers in a fourth column, as the evaluation tool takes
    it, or one such file; None for other files.
    """
    if path.is_dir():
        files = sorted(file for file in path.glob("*.txt") if file.stem in TASKS)
        if not files:
            raise RefusedError(
                f"answers must be a folder with files such as {TASKS[0]}.txt, got {path}, which "
                "has none. Check --answers."
            )
    elif path.suffix == ".txt" and path.is_file():
        files = [path]
    else:
        return None
    records: list[tuple[str, Record]] = []
    for file in files:
        for number, line in enumerate(_lines(file), start=1):
            columns = line.split("\t")
            where = f"{file.name}, line {number}"
            if len(columns) != 4:
                raise RefusedError(
                    f"{where} must have four columns, image, question, label and answer, got "
                    f"{len(columns)}. An answer must hold no tab and no line break; replace them."
                )
            names = ("image", "question", "label", "answer")
            records.append((where, {"task": file.stem, **dict(zip(names, columns, strict=True))}))
    if not records:
        raise RefusedError(f"{path} must have at least one answer, got none. Give another file.")
    return records


def official_word(answer: str) -> bool | None:
    """Return whether yes, or else no, is in the first four characters; None where neither is."""
    start = answer.lower()[:4]
    if "yes" in start:
        return True
    return False if "no" in start else None


def lmms_word(answer: str) -> bool | None:
    """Return lmms-eval's reading: that of the official script without periods, and y or n too."""
    plain = answer.lower().strip().replace(".", "")
    return {"y": True, "n": False}.get(plain, official_word(plain))


def right_by(parse: Callable[[str], bool | None]) -> Callable[[Row, str], list[int]]:
    """Return the score of a rule: whether an answer is right."""

    def score(row: Row, answer: str) -> list[int]:
        return [int(parse(answer) is (row["label"] == "yes"))]

    return score


def image_counts(rows: Sequence[ScoredRow]) -> Array:
    """Return, in the columns of its task, the counts of one image."""
    counts = np.zeros((len(TASKS), _WIDTH))
    right = [scores[0] for _, scores in rows]
    task = TASKS.index(rows[0][0]["task"])
    counts[task] = len(right), sum(right), 1, len(right) == 2 and all(right)
    return counts.ravel()


def _both_right(rows: Sequence[ScoredRow]) -> list[float]:
    right = [scores[0] for _, scores in rows]
    return [float(len(right) == 2 and all(right))]


def task_metrics(counts: Array) -> Mapping[str, Array]:
    """Return accuracy over questions, accuracy over images with both right, and their sum."""
    questions, right, images, both = _columns(counts).sum(axis=-1)
    acc, acc_plus = 100 * right / questions, 100 * both / images
    return {"acc": acc, "acc_plus": acc_plus, "score": acc + acc_plus}


def sum_metrics(tasks: Sequence[str]) -> Metrics:
    """Return the sum of the scores of some tasks, not defined where one of them is missing."""
    places = [TASKS.index(task) for task in tasks]

    def metrics(counts: Array) -> Mapping[str, Array]:
        questions, right, images, both = _columns(counts)[..., places]
        return {"score": (100 * right / questions + 100 * both / images).sum(axis=-1)}

    return metrics


def _llava_prompt(row: Row) -> str:
    question = str(row["text"]).replace(QUESTION_END, "").strip()
    return f"{question}{SHORT_ANSWER}"


def _lmms_prompt(row: Row) -> str:
    """Return the prompt of lmms-eval, which keeps the second of two spaces."""
    question = str(row["text"]).strip().replace(f" {QUESTION_END}", "")
    return f"{question}{SHORT_ANSWER}"


def _image_places(row: Row) -> tuple[str, ...]:
    task, _, image = row["image"].partition("/")
    return row["image"], f"{task}/images/{image}"


def _columns(counts: Array) -> Array:
    """Return the counts with the kind of count first and the task last."""
    return np.moveaxis(counts.reshape(*counts.shape[:-1], len(TASKS), _WIDTH), -1, 0)


def _llava_key(record: Record) -> tuple[str, str, str]:
    task, _, image = str(record["question_id"]).partition("/")
    return question_key(task, image, record["prompt"])


def _rule(parse: Callable[[str], bool | None], note: str) -> Rule:
    return Rule(
        right_by(parse),
        task_metrics,
        combine=image_counts,
        split_metrics={"perception": sum_metrics(PERCEPTION), "cognition": sum_metrics(COGNITION)},
        unit="points",
        units={
            "acc": of_items(lambda scores: scores[0], 100),
            "acc_plus": UnitValues(_both_right, 100),
        },
        says_yes=lambda answer: parse(answer) is True,
        note=note,
    )


MME = Benchmark(
    name="mme",
    title="MME",
    layouts=[
        Layout({f"mme_{task}": (f"{task}.txt",) for task in TASKS}, read_lists),
        Layout({f"mme_{task}": (task,) for task in TASKS}, read_folder, are_folders=True),
    ],
    rules={
        "official": _rule(
            official_word,
            "Reads the first four characters, so None and Not sure count as no, and Y as neither. "
            "A task has at most 200 points, perception 2,000 and cognition 800.",
        ),
        "lmms-eval": _rule(
            lmms_word, "Like the official rule, but ignores periods and accepts y and n."
        ),
        "vlmevalkit": _rule(yes_or_no, "Reads the words yes and no."),
    },
    table=[
        TableRow(
            f"mme_{task}",
            "official",
            "score",
            f"MME {split}, points of {most}",
            is_headline=split != task,
            scale=1,
            undefined="a task is missing",
            split=split,
        )
        for task, split, most in (
            (PERCEPTION[0], "perception", "2,000"),
            (COGNITION[0], "cognition", "800"),
            *((task, task, "200") for task in TASKS),
        )
    ],
    prompts={
        "official": Prompt(),
        "llava": Prompt(_llava_prompt),
        "lmms-eval": Prompt(_lmms_prompt, 16),
        "vlmevalkit": Prompt(),
    },
    image_places=_image_places,
    splits=lambda task, row: (
        "perception" if row["task"] in PERCEPTION else "cognition",
        row["task"],
    ),
    headline=("score",),
    version_keys=("key", "label"),
    versions=dict.fromkeys(VERSION_2023, "2023"),
    answer_reader=read_answer_lists,
    answer_formats=[
        AnswerFormat(
            ("task", "image", "question", "answer"),
            "answer",
            lambda record: question_key(*(record[name] for name in ("task", "image", "question"))),
            lambda row: row["key"],
        ),
        AnswerFormat(("question_id", "prompt", "text"), "text", _llava_key, lambda row: row["key"]),
    ],
    constants={"yes": "Yes", "no": "No"},
)
