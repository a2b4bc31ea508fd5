"""The items of a run: rows of benchmarks with the prompt that a program has published for them."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from realign.data.images import Size
from realign.data.problems import refuse_problems
from realign.data.records import Problem
from realign.errors import RefusedError
from realign.evaluation.benchmark import Prompt, Task
from realign.evaluation.pictures import Pictures
from realign.evaluation.rows import Row, item_key
from realign.evaluation.stored_answers import Item, Question
from realign.modeling.lengths import ImageTokens
from realign.modeling.vocabulary import Vocabulary
from realign.runtime.progress import Progress

Prompts = Mapping[str, tuple[str, Prompt]]  # name of the benchmark -> whose prompt, the prompt


def choose_prompts(tasks: Mapping[str, Task], program: str | None) -> Prompts:
    """Return the prompt of a program for each benchmark, or each benchmark's default.

    Raises:
        RefusedError: Some benchmark has no prompt of that program.
    """
    benchmarks = {task.benchmark.name: task.benchmark for task in tasks.values()}
    lacking = [
        name for name, found in benchmarks.items() if program and program not in found.prompts
    ]
    if lacking:
        known = "; ".join(f"{name}: {', '.join(benchmarks[name].prompts)}" for name in lacking)
        raise RefusedError(
            f"prompt must be one that every benchmark has, got {program!r}, which is none of "
            f"{known}. Name another --prompt, or the other benchmarks with --benchmark."
        )
    return {
        name: (chosen := program or next(iter(found.prompts)), found.prompts[chosen])
        for name, found in benchmarks.items()
    }


def make_items(
    tasks: Mapping[str, Task], prompts: Prompts, pictures: Pictures, max_new_tokens: int | None
) -> list[Item]:
    """Return the items to ask and store, each one of a benchmark once, in the order of the tasks.

    Args:
        tasks: By name.
        prompts: From :func:`choose_prompts`.
        pictures: From :func:`~realign.evaluation.pictures.read_pictures`.
        max_new_tokens: Longest answer; None for the limit that was published with each prompt.
    Raises:
        RefusedError: A row lacks what the prompt needs.
    """
    items: dict[tuple[str, str], Item] = {}
    for task in tasks.values():
        name = task.benchmark.name
        prompt = prompts[name][1]
        for row in task.rows:
            picture = None if row["image"] is None else pictures[name, row["image"]]
            question = Question(
                prompt.text(row),
                picture and picture.path,
                picture and picture.sha256,
                max_new_tokens or prompt.max_new_tokens,
            )
            item = Item(
                name,
                _split(row),
                item_key(row)[1],
                str(row[task.benchmark.cluster]),
                row["image"],
                question,
                row["where"],
            )
            items.setdefault(item_key(row), item)
    return list(items.values())


def _split(row: Row) -> str:
    """Return the last split that is not all, which is the narrowest."""
    return next((split for split in reversed(row["splits"]) if split != "all"), "all")


def check_items(
    name: str, processor: Any, config: Any, items: Sequence[Item], sizes: Mapping[Path, Size]
) -> None:
    """Refuse questions that a model cannot read, before any is asked.

    Args:
        name: Name of the model.
        processor: The model's processor.
        config: The model's configuration.
        items: From :func:`make_items`.
        sizes: Image file to its width and height.
    Raises:
        RefusedError: The processor does not take an image, or a text without one, or a token is
            none of the model's.
    """
    reader = ImageTokens(processor, Vocabulary(processor, config))
    questions = {item.question: item for item in reversed(items)}
    problems = list(_problems(name, reader, list(questions.values())[::-1], sizes))
    refuse_problems(problems, len(questions))


def _problems(
    name: str, reader: ImageTokens, items: Sequence[Item], sizes: Mapping[Path, Size]
) -> Iterator[Problem]:
    with Progress(f"check questions for {name}", len(items)) as progress:
        for item in items:
            path = item.question.image
            try:
                reader.check(item.question.prompt, sizes[path] if path else None)
            except RefusedError as error:
                subject = item.image or "a question without an image"
                message = f"{item.where}, {subject}, model {name}: {error}"
                yield Problem(item.where, item.where, error.field, error.code, message)
            progress.advance()
