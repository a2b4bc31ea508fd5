"""The verb ``realign eval``: ask several models the same questions once, keep their answers, score
them in pairs.

<data>/                       the files of any benchmarks of the registry; docs/evaluation.md
<out>/answers/NAME.jsonl      {"image", "text", "answer", "is_cut"}, every question once
<out>/scores.json, samples/
"""

from __future__ import annotations

import re
import shutil
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch

from realign.config import EvalConfig
from realign.data.image_names import check_image_root, resolve_image
from realign.data.images import Size, decode_image
from realign.data.records import refuse_problems
from realign.errors import RefusedError
from realign.evaluation.benchmark import Task
from realign.evaluation.comparison import score
from realign.evaluation.registry import read_tasks
from realign.evaluation.samples import Question
from realign.generation.generator import Answer, Request
from realign.generation.transformers_generator import TransformersGenerator
from realign.modeling.adapter_folder import check_adapter
from realign.modeling.folder import model_identity, resolve_model
from realign.modeling.lengths import ImageTokens
from realign.modeling.loading import choose_dtype, load_model_config
from realign.modeling.processors import load_processor
from realign.modeling.vocabulary import Vocabulary
from realign.runtime.files import (
    content_sha256,
    file_sha256,
    read_jsonl,
    write_json,
    write_jsonl,
)
from realign.runtime.progress import Progress
from realign.runtime.run_folder import check_out, claim


def evaluate(config: EvalConfig) -> dict[str, Any]:
    """Answer, score and compare; return what ``scores.json`` holds.

    Raises:
        RefusedError: A file or image is missing, a row lacks a key, a model cannot read a question,
            or the output folder holds another run.
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
    for folder in folders.values():
        check_adapter(folder)
    images = _read_images(tasks, config.images)
    digests = {name: digest for name, (digest, _) in images.items()}
    for name, folder in folders.items():
        _check_questions(name, folder, tasks, {image: size for image, (_, size) in images.items()})
    claim(
        config.out,
        "eval",
        {
            "models": {
                name: model_identity(folder, generates=True) for name, folder in folders.items()
            },
            "images": [digests[name] for name in sorted(digests)],
            "data": {
                file: file_sha256(config.data / file)
                for task in tasks.values()
                for file in task.files
            },
            "max_new_tokens": config.max_new_tokens,
            "bootstrap": [config.bootstrap, config.seed],
            "generation": [str(choose_dtype(config.dtype)), config.batch_size],
        },
        {"images": sorted(digests)},
    )
    questions = list(
        dict.fromkeys((row["image"], row["text"]) for task in tasks.values() for row in task.rows)
    )
    answers = {name: _answers(name, folder, questions, config) for name, folder in folders.items()}
    scores = score(tasks, answers, resamples=config.bootstrap, seed=config.seed)
    (config.out / "samples").mkdir(exist_ok=True)
    for number, sample in enumerate(scores["samples"]):
        sample["picture"] = f"{number}{Path(sample['image']).suffix}"
        shutil.copyfile(config.images / sample["image"], config.out / "samples" / sample["picture"])
    write_json(config.out / "scores.json", scores)
    return scores


def _read_images(tasks: Mapping[str, Task], images: Path) -> dict[str, tuple[str, Size]]:
    """Decode every image once; return image name to SHA-256 of the file and size.

    Raises:
        RefusedError: An image is missing or unreadable.
    """
    check_image_root(images)
    found: dict[str, tuple[str, Size]] = {}
    for task in tasks.values():
        for row in task.rows:
            path = resolve_image(images, row["image"], row["where"])
            if row["image"] not in found:
                raw = path.read_bytes()
                decoded = decode_image(raw, f"{row['where']}, {row['image']}")
                found[row["image"]] = (content_sha256(raw), decoded.size)
    return found


def _check_questions(
    name: str, folder: Path, tasks: Mapping[str, Task], sizes: Mapping[str, Size]
) -> None:
    """Refuse questions that a model cannot read, before any is asked.

    Raises:
        RefusedError: Its processor does not take an image, or a token is none of the model's.
    """
    processor = load_processor(folder)
    reader = ImageTokens(processor, Vocabulary(processor, load_model_config(folder)))
    questions = {
        (row["image"], row["text"]): row["where"] for task in tasks.values() for row in task.rows
    }
    problems = []
    with Progress(f"check questions for {name}", len(questions)) as progress:
        for (image, text), where in questions.items():
            try:
                reader.check(text, sizes[image])
            except RefusedError as error:
                problems.append(f"{where}, {image}, model {name}: {error}")
            progress.advance()
    refuse_problems(problems, len(questions))


def _answers(
    name: str, folder: Path, questions: Sequence[Question], config: EvalConfig
) -> dict[Question, Answer]:
    path = config.out / "answers" / f"{name}.jsonl"
    if not path.is_file():
        write_jsonl(path, _ask(name, folder, questions, config))
        torch.cuda.empty_cache()
    return {
        (row["image"], row["text"]): Answer(row["answer"], row["is_cut"])
        for row in read_jsonl(path)
    }


def _ask(
    name: str, folder: Path, questions: Sequence[Question], config: EvalConfig
) -> list[dict[str, Any]]:
    """Return the raw answers of a model, in the order of the questions."""
    generator = TransformersGenerator.load(
        folder, choose_dtype(config.dtype), config.max_new_tokens, config.batch_size
    )
    rows = {}
    with Progress(f"answers of {name}", len(questions)) as progress:
        # alike questions together: answers of one length waste no steps
        ordered = sorted(questions, key=lambda question: (len(question[1]), question))
        for start in range(0, len(ordered), config.batch_size):
            batch = ordered[start : start + config.batch_size]
            answers = generator([Request(text, config.images / image) for image, text in batch])
            for (image, text), (answer, is_cut, _) in zip(batch, answers, strict=True):
                row = {"image": image, "text": text, "answer": answer, "is_cut": is_cut}
                rows[image, text] = row
            progress.advance(len(batch))
    return [rows[question] for question in questions]
