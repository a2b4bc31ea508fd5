"""The stages of a build as tasks: the work of an engine's workers on one shard of rows.

A shard consists of whole windows, and generation batches are formed within a window, so that the
result depends neither on the shard size nor on the worker.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeVar

from realign.building.acceptance import CUT, EMPTY, REFUSED, SPECIAL, Acceptance
from realign.building.induction import TOO_LONG, Candidate, Outcome, induce
from realign.building.masking.masker import Fits, Masked, MaskRules, mask_rows
from realign.building.models import Asked
from realign.building.similarity import Similarity, load_similarity
from realign.building.speech import refuses
from realign.data.formats.source_row import SourceRow
from realign.data.records import IMAGE_TOKEN
from realign.generation.generator import Answer, Generator, Request
from realign.runtime.files import json_text

T = TypeVar("T")


def windows(rows: Sequence[T], size: int) -> Iterator[Sequence[T]]:
    """Yield the parts of ``rows`` whose generation batches are formed together."""
    for start in range(0, len(rows), size):
        yield rows[start : start + size]


def jsonl_bytes(rows: Iterable[Any]) -> bytes:
    """Return one JSON value per line."""
    return "".join(json_text(row) + "\n" for row in rows).encode()


@dataclass(frozen=True)
class Annotate:
    """Task that generates missing answers. A line has an ``answer`` or a ``problem``."""

    asked: Asked
    prompt: str
    special: tuple[str, ...]
    window: int

    @contextmanager
    def open(self) -> Iterator[Callable[[Sequence[SourceRow]], bytes]]:
        """Load the model."""
        with self.asked.open() as (generator, fits):
            yield lambda rows: jsonl_bytes(
                line
                for part in windows(rows, self.window)
                for line in self._lines(part, generator, fits)
            )

    def _lines(
        self, rows: Sequence[SourceRow], generator: Generator, fits: Fits
    ) -> Iterator[dict[str, str]]:
        requests = {
            row.id: Request(self.prompt.replace("{instruction}", row.instruction), row.path)
            for row in rows
            if not row.answer
        }
        fitting = {
            row.id: requests[row.id]
            for row in rows
            if row.id in requests and fits(requests[row.id].prompt, row.path)
        }
        answers = dict(zip(fitting, generator([*fitting.values()]), strict=True))
        for row in rows:
            if row.id in requests:
                yield self._line(row, answers.get(row.id))
            else:
                yield {"id": row.id, "answer": row.answer, "problem": ""}

    def _line(self, row: SourceRow, answered: Answer | None) -> dict[str, str]:
        problem = (
            TOO_LONG
            if answered is None
            else answered.short_problem
            or (CUT if answered.is_cut else "")
            or ("" if answered.text else EMPTY)
            or (
                SPECIAL
                if any(t in answered.text for t in (*self.special, IMAGE_TOKEN) if t)
                else ""
            )
            or (REFUSED if refuses(answered.text, "") else "")
        )
        return {
            "id": row.id,
            "answer": answered.text if answered and not problem else "",
            "problem": problem,
        }


@dataclass(frozen=True)
class Mask:
    """Task that masks answers. A line is a :class:`Masked`, empty for rows that need no mask."""

    asked: Asked | None
    rules: MaskRules
    window: int

    @contextmanager
    def open(self) -> Iterator[Callable[[Sequence[SourceRow]], bytes]]:
        """Load the model, if one masks."""
        with ExitStack() as stack:
            generator, fits = (
                stack.enter_context(self.asked.open()) if self.asked else (None, _always)
            )
            yield lambda rows: jsonl_bytes(
                line
                for part in windows(rows, self.window)
                for line in self._lines(part, generator, fits)
            )

    def _lines(
        self, rows: Sequence[SourceRow], generator: Generator | None, fits: Fits
    ) -> Iterator[dict[str, str]]:
        answered = [row for row in rows if row.answer]
        found = zip(answered, mask_rows(answered, self.rules, generator, fits), strict=True)
        masked = {row.id: mask for row, mask in found}
        for row in rows:
            mask = masked.get(row.id, Masked("", ""))
            yield {"id": row.id, "text": mask.text, "by": mask.by}


@dataclass(frozen=True)
class Prepared:
    """A row with everything that its rejected answer is induced from.

    Attributes:
        row: The row.
        masked: The masked answer.
        candidates: Retrieved images, the best first.
        problem: Reason why the row has no answer; empty if it has one.
    """

    row: SourceRow
    masked: Masked
    candidates: Sequence[Candidate]
    problem: str = ""


@dataclass(frozen=True)
class Induce:
    """Task that finds the retrieved image of every row, and its rejected answer if it has none. A
    line is an :class:`Outcome`.

    Attributes:
        asked: The model to be aligned; None if every row has a rejected answer.
        similarity: Name of the similarity, which the worker loads.
        acceptance: Function that returns the settings of acceptance with that similarity.
        window: Number of rows whose generation batches are formed together.
    """

    asked: Asked | None
    similarity: str
    acceptance: Callable[[Similarity], Acceptance]
    window: int

    @contextmanager
    def open(self) -> Iterator[Callable[[Sequence[Prepared]], bytes]]:
        """Load the similarity, and the model if it is asked."""
        acceptance = self.acceptance(load_similarity(self.similarity))
        with ExitStack() as stack:
            generator, fits = (
                stack.enter_context(self.asked.open()) if self.asked else (_nobody, _always)
            )
            yield lambda rows: jsonl_bytes(
                outcome.as_row()
                for part in windows(rows, self.window)
                for outcome in _outcomes(part, acceptance, generator, fits)
            )


def _outcomes(
    rows: Sequence[Prepared], acceptance: Acceptance, generator: Generator, fits: Fits
) -> Iterator[Outcome]:
    answered = [each for each in rows if each.row.answer]
    induced = induce(
        [each.row for each in answered],
        [each.masked for each in answered],
        [each.candidates for each in answered],
        acceptance,
        generator,
        fits,
    )
    found = {outcome.id: outcome for outcome in induced}
    for each in rows:
        unanswered = Outcome(each.row.id, reason=f"no answer: {each.problem}")
        yield found.get(each.row.id, unanswered)


def _always(prompt: str, image: Path) -> bool:
    return True


def _nobody(requests: Sequence[Request]) -> list[Answer]:
    assert not requests, "every row has its rejected answer"
    return []
