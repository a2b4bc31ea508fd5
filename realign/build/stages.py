"""The stages of a build as tasks: what an engine's workers do with one shard of rows.

A shard is whole windows, and generation batches are formed within a window, so that the result
depends neither on the size of a shard nor on who makes it.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any, TypeVar

from realign.build.acceptance import Acceptance
from realign.build.induction import Candidate, Outcome, attach, induce
from realign.build.masker import Masked, MaskRules, mask_rows
from realign.build.models import Asked
from realign.build.row import SourceRow
from realign.build.similarity import load_similarity
from realign.generate.answer import Answer
from realign.generate.generator import Request

T = TypeVar("T")


def windows(rows: Sequence[T], size: int) -> Iterator[Sequence[T]]:
    """The parts of ``rows`` whose generation batches are formed together."""
    for start in range(0, len(rows), size):
        yield rows[start : start + size]


def jsonl_bytes(rows: Iterable[Any]) -> bytes:
    """One JSON value a line."""
    return "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows).encode()


@dataclass(frozen=True)
class Annotate:
    """Asks for the answers that rows lack. A line has ``answer``, or ``problem``."""

    asked: Asked
    prompt: str
    special: tuple[str, ...]
    window: int

    def open(self) -> Callable[[Sequence[SourceRow]], bytes]:
        """Load the model."""
        generator, fits = self.asked.open()

        def work(rows: Sequence[SourceRow]) -> bytes:
            lines: list[dict[str, str]] = []
            for part in windows(rows, self.window):
                requests = {
                    row.id: Request(self.prompt.replace("{instruction}", row.instruction), row.path)
                    for row in part
                    if not row.answer
                }
                fitting = {i: each for i, each in requests.items() if fits(*each)}
                answers = dict(zip(fitting, generator([*fitting.values()]), strict=True))
                lines += [
                    self._line(row, answers.get(row.id))
                    if row.id in requests
                    else {"id": row.id, "answer": row.answer, "problem": ""}
                    for row in part
                ]
            return jsonl_bytes(lines)

        return work

    def _line(self, row: SourceRow, said: Answer | None) -> dict[str, str]:
        problem = (
            "prompt longer than max_length"
            if said is None
            else said.problem
            or ("cut at max_new_tokens" if said.is_cut else "")
            or ("" if said.text else "empty")
            or ("special token" if any(t in said.text for t in self.special if t) else "")
        )
        return {
            "id": row.id,
            "answer": said.text if said and not problem else "",
            "problem": problem,
        }


@dataclass(frozen=True)
class Mask:
    """Masks answers. A line is a :class:`Masked`; rows that need none have an empty one."""

    asked: Asked | None
    rules: MaskRules
    window: int

    def open(self) -> Callable[[Sequence[SourceRow]], bytes]:
        """Load the model, if one masks."""
        generator, fits = self.asked.open() if self.asked else (None, lambda *_: True)

        def work(rows: Sequence[SourceRow]) -> bytes:
            lines = []
            for part in windows(rows, self.window):
                todo = [row for row in part if row.answer and not row.rejected]
                masked = dict(
                    zip(
                        (row.id for row in todo),
                        mask_rows(todo, self.rules, generator, fits),
                        strict=True,
                    )
                )
                nothing = Masked("", "")
                lines += [
                    {"id": row.id, "text": mask.text, "by": mask.by}
                    for row in part
                    for mask in (masked.get(row.id, nothing),)
                ]
            return jsonl_bytes(lines)

        return work


@dataclass(frozen=True)
class Prepared:
    """A row on its way to a pair.

    Attributes:
        problem: Why it has no answer.
    """

    row: SourceRow
    masked: Masked
    candidates: Sequence[Candidate]
    problem: str = ""


@dataclass(frozen=True)
class Induce:
    """Finds the retrieved image of every row and, where there is none yet, the rejected answer. A
    line is an :class:`Outcome`.

    Attributes:
        asked: The model to be aligned; None where every row has a rejected answer.
        similarity: Name of the similarity, loaded in the worker.
        make_acceptance: The other settings of acceptance.
    """

    asked: Asked | None
    similarity: str
    acceptance: Callable[[Any], Acceptance]
    window: int

    def open(self) -> Callable[[Sequence[Prepared]], bytes]:
        """Load the model and the similarity."""
        if self.asked is None:
            return lambda rows: jsonl_bytes(_attached(row).as_row() for row in rows)
        generator, fits = self.asked.open()
        acceptance = self.acceptance(load_similarity(self.similarity))

        def work(rows: Sequence[Prepared]) -> bytes:
            lines = []
            for part in windows(rows, self.window):
                todo = [each for each in part if each.row.answer and not each.row.rejected]
                induced = induce(
                    [each.row for each in todo],
                    [each.masked for each in todo],
                    [each.candidates for each in todo],
                    acceptance,
                    generator,
                    fits,
                )
                outcomes = {outcome.id: outcome for outcome in induced}
                lines += [(outcomes.get(each.row.id) or _attached(each)).as_row() for each in part]
            return jsonl_bytes(lines)

        return work


def _attached(each: Prepared) -> Outcome:
    if not each.row.answer:
        return Outcome(each.row.id, reason=f"no answer: {each.problem}")
    return attach(each.row, each.candidates)
