"""The verb ``realign eval``: ask several models the same questions once, keep what they said, score
it in pairs.

Any of these files; what is not there is not measured.
<data>/pope_random.jsonl, pope_popular.jsonl, pope_adversarial.jsonl    {"question_id", "image",
"text", "label"}
<data>/chair.jsonl            {"image_id", "image", "text", "objects"}
<data>/chair_objects.json     object -> its synonyms; with chair.jsonl
<out>/answers/NAME.jsonl      {"image", "text", "answer", "is_cut"}, every question once
<out>/scores.json
"""

from __future__ import annotations

import re
import shutil
from collections.abc import Callable, Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch

from realign.config import EvalConfig
from realign.errors import RefusedError
from realign.evaluation.bootstrap import Array, paired_scores
from realign.evaluation.chair import caption_counts, chair_metrics
from realign.evaluation.pope import confusion, pope_metrics
from realign.evaluation.samples import caption_samples, question_samples
from realign.evaluation.tasks import Question, check_images, read_synonyms, read_tasks
from realign.generation.generator import Answer, Generator, Request
from realign.generation.transformers_generator import TransformersGenerator
from realign.modeling.folder import model_identity, resolve_model
from realign.modeling.loading import choose_dtype
from realign.runtime.files import file_sha256, read_jsonl, write_json, write_jsonl
from realign.runtime.progress import Progress
from realign.runtime.run_folder import check_out, claim


def evaluate(config: EvalConfig) -> dict[str, Any]:
    """Answer, score and compare; returns what ``scores.json`` holds.

    Raises:
        RefusedError: A file or image is missing, a row lacks a key, or the output folder holds
            another run.
    """
    check_out(config.out)
    tasks = read_tasks(config.data)
    folders = {name: resolve_model(model) for name, model in config.models.items()}
    if not folders:
        raise RefusedError(
            "eval.models must name at least one model, got none. Pass --model NAME=FOLDER."
        )
    if bad := [name for name in folders if not re.fullmatch(r"[\w .+-]+", name)]:
        raise RefusedError(f"eval.models must have plain names, got {bad[0]!r}. Rename it.")
    captions = tasks.get("chair", [])
    synonyms = read_synonyms(config.data, captions) if captions else {}
    digests = check_images(tasks, config.images)
    claim(
        config.out,
        "eval",
        {
            "models": {
                name: model_identity(folder, generates=True) for name, folder in folders.items()
            },
            "images": [digests[name] for name in sorted(digests)],
            "data": {path.name: file_sha256(path) for path in sorted(config.data.glob("*.json*"))},
            "max_new_tokens": config.max_new_tokens,
            "bootstrap": [config.bootstrap, config.seed],
            "generation": [str(choose_dtype(config.dtype)), config.batch_size],
        },
        {"images": sorted(digests)},
    )
    questions = list(
        dict.fromkeys((row["image"], row["text"]) for rows in tasks.values() for row in rows)
    )
    answers = {name: _answers(name, folder, questions, config) for name, folder in folders.items()}
    scores = score(tasks, answers, synonyms, resamples=config.bootstrap, seed=config.seed)
    scores["samples"] = [
        *caption_samples(captions, answers, synonyms),
        *question_samples(tasks.get("pope_adversarial", []), answers),
    ]
    (config.out / "samples").mkdir(exist_ok=True)
    for number, sample in enumerate(scores["samples"]):
        sample["picture"] = f"{number}{Path(sample['image']).suffix}"
        shutil.copyfile(config.images / sample["image"], config.out / "samples" / sample["picture"])
    write_json(config.out / "scores.json", scores)
    return scores


def _answers(
    name: str, folder: Path, questions: Sequence[Question], config: EvalConfig
) -> dict[Question, Answer]:
    path = config.out / "answers" / f"{name}.jsonl"
    if not path.is_file():
        generator = TransformersGenerator.load(
            folder, choose_dtype(config.dtype), config.max_new_tokens, config.batch_size
        )
        write_jsonl(
            path, ask(generator, questions, config.images, config.batch_size, f"answers of {name}")
        )
        del generator
        torch.cuda.empty_cache()
    return {
        (row["image"], row["text"]): Answer(row["answer"], row["is_cut"])
        for row in read_jsonl(path)
    }


def ask(
    generator: Generator,
    questions: Sequence[Question],
    images: Path,
    batch_size: int,
    label: str,
) -> list[dict[str, Any]]:
    """Raw answers, in the order of the questions."""
    rows = []
    with Progress(label, len(questions)) as progress:
        # alike questions together: answers of one length waste no steps
        ordered = sorted(questions, key=lambda question: (len(question[1]), question))
        for start in range(0, len(ordered), batch_size):
            batch = ordered[start : start + batch_size]
            answers = generator([Request(text, images / image) for image, text in batch])
            rows += [
                {"image": image, "text": text, "answer": said.text, "is_cut": said.is_cut}
                for (image, text), said in zip(batch, answers, strict=True)
            ]
            progress.advance(len(batch))
    order = {question: i for i, question in enumerate(questions)}
    return sorted(rows, key=lambda row: order[row["image"], row["text"]])


def score(
    tasks: Mapping[str, Sequence[Mapping[str, Any]]],
    answers: Mapping[str, Mapping[Question, Answer]],
    synonyms: Mapping[str, list[str]],
    *,
    resamples: int,
    seed: int,
) -> dict[str, Any]:
    """Score stored answers: task -> items, cut answers by model, rule, models (see
    :func:`~realign.evaluation.bootstrap.paired_scores`).
    """
    baseline = next(iter(answers))
    scores: dict[str, Any] = {"baseline": baseline, "tasks": {}}
    for task, rows in tasks.items():
        count, metrics, rule = (
            (partial(_count_caption, synonyms=synonyms), chair_metrics, "words of the object list")
            if task == "chair"
            else (_count_answer, pope_metrics, "official POPE")
        )
        counts = {model: _counts_by_image(rows, said, count) for model, said in answers.items()}
        scores["tasks"][task] = {
            "items": len(rows),
            "images": len(counts[baseline]),
            "cut": {
                model: sum(said[row["image"], row["text"]].is_cut for row in rows)
                for model, said in answers.items()
            },
            "rule": rule,
            "models": paired_scores(
                counts, metrics, baseline=baseline, resamples=resamples, seed=seed
            ),
        }
    return scores


def _count_caption(
    row: Mapping[str, Any], answer: str, synonyms: Mapping[str, list[str]]
) -> list[int]:
    return caption_counts(answer, row["objects"], synonyms)


def _count_answer(row: Mapping[str, Any], answer: str) -> list[int]:
    return confusion(row["label"], answer)


def _counts_by_image(
    rows: Sequence[Mapping[str, Any]],
    said: Mapping[Question, Answer],
    count: Callable[[Mapping[str, Any], str], list[int]],
) -> Array:
    totals: dict[str, Array] = {}
    for row in rows:
        counts = np.array(count(row, said[row["image"], row["text"]].text), dtype=np.float64)
        totals[row["image"]] = totals.get(row["image"], np.zeros(4)) + counts
    return np.stack(list(totals.values()))
