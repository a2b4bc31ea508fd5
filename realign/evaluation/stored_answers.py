"""Files of answers by ``realign eval``: one JSON line per item, and a header with their origin.

<out>/answers/NAME.jsonl          fields of :class:`Item`, with answer, is_cut and tokens
<out>/answers/NAME.header.json    the model and everything else that the answers depend on
"""

from __future__ import annotations

from collections.abc import Collection, Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

from realign.errors import RefusedError
from realign.generation.generator import Answer
from realign.runtime.files import (
    canonical_json,
    content_sha256,
    read_jsonl,
    write_json,
    write_jsonl,
)

HEADER = ".header.json"
Line = dict[str, Any]


class Question(NamedTuple):
    """A question to a model. Items that share a question share its answer."""

    prompt: str  # before the chat template
    image: Path | None
    image_sha256: str | None
    max_new_tokens: int

    @property
    def key(self) -> str:
        """Key of the question's content, independent of the path of its image."""
        parts = [self.prompt, self.image_sha256, self.max_new_tokens]
        return content_sha256(canonical_json(parts))


class Item(NamedTuple):
    """A row of a benchmark, as models are asked and answers are stored."""

    benchmark: str
    split: str
    id: str  # unique in the benchmark
    group: str  # items of one group are not independent
    image: str | None  # name of the image in the data
    question: Question
    where: str  # place of the row in the data, for messages; not stored


def write_answers(
    path: Path,
    header: Mapping[str, Any],
    items: Iterable[Item],
    answers: Mapping[str, Answer],
) -> None:
    """Write the header of a model's answers and then the answers, so that none lack a header.

    Args:
        path: File ``NAME.jsonl``.
        header: Everything that the answers depend on.
        items: All items that were asked, in order.
        answers: :attr:`Question.key` to answer.
    """
    write_json(header_path(path), header)
    write_jsonl(path, [_line(item, answers[item.question.key]) for item in items])


def header_path(path: Path) -> Path:
    """Return the path of the header of stored answers."""
    return path.with_suffix(HEADER)


def _line(item: Item, answer: Answer) -> Line:
    return {
        "benchmark": item.benchmark,
        "split": item.split,
        "id": item.id,
        "group": item.group,
        "image": item.image,
        "image_sha256": item.question.image_sha256,
        "prompt": item.question.prompt,
        "answer": answer.text,
        "is_cut": answer.is_cut,
        "tokens": answer.num_tokens,
    }


def read_stored_answers(
    path: Path, wanted: Collection[tuple[str, str]]
) -> dict[tuple[str, str], Answer]:
    """Return the stored answers by benchmark and id.

    Args:
        path: A file that :func:`write_answers` wrote.
        wanted: Benchmark and id of every item that was asked.
    Raises:
        RefusedError: The file lacks an item, or holds another one.
    """
    answers = {
        (line["benchmark"], line["id"]): Answer(
            line["answer"], line["is_cut"], num_tokens=line["tokens"]
        )
        for line in read_jsonl(path)
    }
    if different := {*wanted}.symmetric_difference(answers):
        raise RefusedError(
            f"{path} must hold the answers to the {len(wanted):,} questions of this run, got "
            f"{len(answers):,}, first different {' '.join(min(different))}. Remove the file to "
            "have all asked again."
        )
    return answers


def make_batches(items: Iterable[Item], batch_size: int) -> list[Sequence[Question]]:
    """Divide the questions into batches.

    The batches depend only on the questions and the batch size: a question always shares its batch
    with the same others, whatever the number of processes and of earlier answers. Either all
    questions of a batch have an image or none has, and all have the same limit on the length of the
    answer. Similar questions are put together, since answers of equal length waste no steps.
    """
    questions = {item.question.key: item.question for item in items}
    groups: dict[tuple[bool, int], list[tuple[int, str, str]]] = {}
    for key, question in questions.items():
        kind = (question.image is None, question.max_new_tokens)
        groups.setdefault(kind, []).append((len(question.prompt), question.prompt, key))
    return [
        [questions[key] for _, _, key in ordered[start : start + batch_size]]
        for _, group in sorted(groups.items())
        for ordered in [sorted(group)]
        for start in range(0, len(ordered), batch_size)
    ]
