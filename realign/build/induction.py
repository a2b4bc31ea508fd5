"""Induces the rejected answers of a group of rows: refill, compare, accept, or try the next
image.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from realign.build.acceptance import Acceptance, refusal
from realign.build.masker import Fits, Masked
from realign.build.prompts import completion_request
from realign.build.row import SourceRow
from realign.generate.generator import Generator, Request

TOO_LONG = "prompt longer than max_length"


@dataclass(frozen=True)
class Candidate:
    """A retrieved image: its name, path, place in the ranking from 1, and cosine."""

    name: str
    path: Path
    rank: int
    cosine: float


@dataclass
class Outcome:
    """What became of one source row."""

    id: str
    masked: str = ""
    masked_by: str = ""  # rule, model, or rule after model
    reason: str = ""  # why no pair came out; empty when one did
    completion: str = ""
    similarity: float = 0.0
    image: str = ""  # the retrieved image that induced the completion
    rank: int = 0
    cosine: float = 0.0
    refused: list[dict[str, Any]] = field(default_factory=list)  # candidates tried before

    def as_row(self) -> dict[str, Any]:
        """For a shard file."""
        return asdict(self)

    def accept(self, candidate: Candidate, completion: str = "", similarity: float = 0.0) -> None:
        """Make ``candidate`` the retrieved image."""
        self.completion, self.similarity = completion, round(similarity, 6)
        self.image, self.rank = candidate.name, candidate.rank
        self.cosine = round(candidate.cosine, 6)

    def refuse(self, candidate: Candidate, reason: str, completion: str = "") -> None:
        """Note why ``candidate`` does not serve."""
        self.refused.append({"image": candidate.name, "reason": reason, "completion": completion})


def induce(
    rows: Sequence[SourceRow],
    masked: Sequence[Masked],
    candidates: Sequence[Sequence[Candidate]],
    acceptance: Acceptance,
    generator: Generator,
    fits: Fits,
) -> list[Outcome]:
    """The first candidate whose completion passes becomes the retrieved image (paper, 3.1).

    Args:
        rows: Rows with answers.
        masked: Their masked answers.
        candidates: Their retrieved images, best first.
        acceptance: What passes.
        generator: The model to be aligned.
        fits: Says which requests it can be asked.
    """
    outcomes = [
        Outcome(row.id, masked=mask.text, masked_by=mask.by)
        for row, mask in zip(rows, masked, strict=True)
    ]
    waiting: list[list[Candidate]] = []
    for row, outcome, images in zip(rows, outcomes, candidates, strict=True):
        waiting.append([])
        if not outcome.masked:
            outcome.reason = "nothing to mask"
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
        completions = generator(
            [
                Request(
                    completion_request(rows[i].instruction, outcomes[i].masked),
                    waiting[i][turn].path,
                )
                for i in trying
            ]
        )
        similarities = (
            acceptance.similarity(
                [rows[i].answer for i in trying], [said.text for said in completions]
            )
            if trying
            else []
        )
        for i, said, similarity in zip(trying, completions, similarities, strict=True):
            reason = refusal(rows[i].answer, outcomes[i].masked, said, similarity, acceptance)
            if reason:
                outcomes[i].refuse(waiting[i][turn], reason, said.text)
            else:
                outcomes[i].accept(waiting[i][turn], said.text, similarity)
    for outcome in outcomes:
        if not outcome.image and not outcome.reason:
            outcome.reason = why_none(outcome)
    return outcomes


def why_none(outcome: Outcome) -> str:
    """Why no candidate was accepted, in few words that can be counted."""
    refused = Counter(attempt["reason"] for attempt in outcome.refused)
    return (
        f"no candidate passed, mostly {refused.most_common(1)[0][0]}" if refused else "no candidate"
    )
