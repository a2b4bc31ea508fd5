"""Induction of rejected answers for a group of rows: the model refills a masked answer, which is
accepted or tried again with the next image.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from realign.building.acceptance import Acceptance, refusal
from realign.building.masking.masker import Fits, Masked
from realign.building.prompts import completion_request, unwrap_completion
from realign.building.similarity import Similarity
from realign.data.formats.source_row import SourceRow
from realign.generation.generator import Generator, Request
from realign.runtime.files import finite_or_null

TOO_LONG = "prompt longer than max_length"
NOTHING_TO_MASK = "nothing to mask"
NO_CANDIDATE = "no candidate"


@dataclass(frozen=True)
class Candidate:
    """A retrieved image: its name, path, rank from 1, and cosine."""

    name: str
    path: Path
    rank: int
    cosine: float


@dataclass
class Outcome:
    """The outcome of one source row.

    Attributes:
        id: Id of the row.
        masked: The masked answer; empty if there was nothing to mask.
        masked_by: ``by`` of :class:`~realign.building.masking.masker.Masked`.
        reason: Reason why the row gave no pair; empty if it gave one.
        completion: The rejected answer.
        similarity: Similarity of the answer and the completion.
        image: Name of the retrieved image that induced the completion.
        rank: Rank of that image.
        cosine: Cosine of that image.
        refused: Candidates that were refused, each with image, rank, cosine, reason, completion and
            similarity; the last two are "" and 0 if nothing was generated.
    """

    id: str
    masked: str = ""
    masked_by: str = ""
    reason: str = ""
    completion: str = ""
    similarity: float = 0.0
    image: str = ""
    rank: int = 0
    cosine: float = 0.0
    refused: list[dict[str, Any]] = field(default_factory=list)

    def as_row(self) -> dict[str, Any]:
        """Return the outcome as a row of a shard file; a similarity that is NaN is null."""
        row: dict[str, Any] = finite_or_null(asdict(self))
        return row

    def accept(self, candidate: Candidate, completion: str, similarity: float) -> None:
        """Make ``candidate`` the retrieved image."""
        self.completion, self.similarity = completion, similarity
        self.image, self.rank = candidate.name, candidate.rank
        self.cosine = round(candidate.cosine, 6)

    def refuse(
        self, candidate: Candidate, reason: str, completion: str = "", similarity: float = 0.0
    ) -> None:
        """Record the reason why ``candidate`` was refused."""
        self.refused.append(
            {
                "image": candidate.name,
                "rank": candidate.rank,
                "cosine": round(candidate.cosine, 6),
                "reason": reason,
                "completion": completion,
                "similarity": similarity,
            }
        )


def induce(
    rows: Sequence[SourceRow],
    masked: Sequence[Masked],
    candidates: Sequence[Sequence[Candidate]],
    acceptance: Acceptance,
    generator: Generator,
    fits: Fits,
) -> list[Outcome]:
    """Find the rejected answer and the retrieved image of each row: the first candidate whose
    completion is accepted (paper, section 3.1). A row that already has its rejected answer only
    gets an image, see :func:`attach`.

    The outcome of a row does not depend on the other rows, except that the numerics of a generator
    or an encoder may depend on the batch.

    Args:
        rows: Rows with answers.
        masked: Masked answer of each row.
        candidates: Retrieved images of each row, the best first.
        acceptance: Settings of acceptance.
        generator: The model to be aligned.
        fits: Function that tells whether a request is short enough for the generator.
    """
    outcomes = [
        Outcome(row.id, masked=mask.text, masked_by=mask.by)
        for row, mask in zip(rows, masked, strict=True)
    ]
    paired = [i for i, row in enumerate(rows) if row.rejected]
    attached = attach(
        [rows[i] for i in paired], [candidates[i] for i in paired], acceptance.similarity
    )
    for i, outcome in zip(paired, attached, strict=True):
        outcomes[i] = outcome
    waiting: list[list[Candidate]] = []
    for row, outcome, images in zip(rows, outcomes, candidates, strict=True):
        waiting.append([])
        if row.rejected:
            continue
        if not outcome.masked:
            outcome.reason = NOTHING_TO_MASK
            continue
        request = completion_request(row.instruction, outcome.masked)
        for candidate in images:
            if fits(request, candidate.path):
                waiting[-1].append(candidate)
            else:
                outcome.refuse(candidate, TOO_LONG)
    for turn in range(max(map(len, waiting), default=0)):
        trying = [
            i for i, images in enumerate(waiting) if turn < len(images) and not outcomes[i].image
        ]
        if trying:
            _try(
                [rows[i] for i in trying],
                [outcomes[i] for i in trying],
                [waiting[i][turn] for i in trying],
                acceptance,
                generator,
            )
    for outcome in outcomes:
        outcome.refused.sort(key=lambda attempt: attempt["rank"])
        if not outcome.image and not outcome.reason:
            outcome.reason = why_none(outcome)
    return outcomes


def _try(
    rows: Sequence[SourceRow],
    outcomes: Sequence[Outcome],
    images: Sequence[Candidate],
    acceptance: Acceptance,
    generator: Generator,
) -> None:
    """Complete each row's masked answer on one image, and accept or refuse it."""
    replies = generator(
        [
            Request(completion_request(row.instruction, outcome.masked), image.path)
            for row, outcome, image in zip(rows, outcomes, images, strict=True)
        ]
    )
    completions = [
        reply._replace(text=unwrap_completion(reply.text, row.answer))
        for row, reply in zip(rows, replies, strict=True)
    ]
    similarities = _rounded(
        rows, [completed.text for completed in completions], acceptance.similarity
    )
    for row, outcome, image, completed, similarity in zip(
        rows, outcomes, images, completions, similarities, strict=True
    ):
        if reason := refusal(row, outcome.masked, completed, similarity, acceptance):
            outcome.refuse(image, reason, completed.text, similarity)
        else:
            outcome.accept(image, completed.text, similarity)


def attach(
    rows: Sequence[SourceRow],
    candidates: Sequence[Sequence[Candidate]],
    similarity: Similarity,
) -> list[Outcome]:
    """Give each row that already has its rejected answer its first candidate as retrieved image.
    Nothing is generated or refused.

    Args:
        rows: Rows with both answers.
        candidates: Retrieved images of each row, the best first.
        similarity: Function that compares the two answers, for the provenance.
    """
    outcomes = [Outcome(row.id) for row in rows]
    values = _rounded(rows, [row.rejected for row in rows], similarity) if rows else []
    for row, outcome, images, value in zip(rows, outcomes, candidates, values, strict=True):
        if images:
            outcome.accept(images[0], row.rejected, value)
        else:
            outcome.reason = NO_CANDIDATE
    return outcomes


def _rounded(
    rows: Sequence[SourceRow], others: Sequence[str], similarity: Similarity
) -> list[float]:
    """Return similarities of answers, rounded as they are stored and as they are compared."""
    return [round(value, 6) for value in similarity([row.answer for row in rows], others)]


def why_none(outcome: Outcome) -> str:
    """Return a short reason why no candidate was accepted, which can be counted."""
    refused = Counter(attempt["reason"] for attempt in outcome.refused)
    return (
        f"{NO_CANDIDATE} passed, mostly {refused.most_common(1)[0][0]}" if refused else NO_CANDIDATE
    )
