"""Induces the rejected answers of one group of records: refill, compare, accept, or try the next
image.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from random import Random
from typing import Any, Protocol

from PIL import Image

from realign.build.masking import Lexicon, fits_mask, mask_by_rule, masks_only
from realign.build.prompts import MASK_TOKEN, completion_request, masking_request
from realign.build.similarity import Similarity
from realign.build.sources import SourceRow
from realign.generate.answer import Answer
from realign.images import decode_image
from realign.records import IMAGE_TOKEN

TOO_LONG = "prompt longer than max_length"


class Generator(Protocol):
    """What can answer prompts about images."""

    def __call__(self, prompts: Sequence[str], images: Sequence[Image.Image]) -> list[Answer]:
        """Answer each prompt about its image."""
        ...


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


@dataclass(frozen=True)
class Rules:
    """Settings of masking and acceptance, as in BuildConfig."""

    mask: str
    lexicon: Lexicon
    mask_rates: Mapping[str, float]
    similarity: Similarity
    threshold: float
    keep_unmasked: bool
    seed: int
    special: tuple[str, ...] = ()  # the model's special tokens
    # whether a prompt about an image is short enough to be asked
    fits: Callable[[str, Path], bool] = lambda prompt, path: True


def mask_group(
    rows: Sequence[SourceRow], rules: Rules, generator: Generator, batch_size: int
) -> list[Outcome]:
    """Mask each answer. A model's mask that changes any other word falls back to the rule."""
    outcomes = [Outcome(row.id) for row in rows]
    if rules.mask == "model":
        requests = [masking_request(row.answer) for row in rows]
        asked = [i for i, row in enumerate(rows) if rules.fits(requests[i], row.path)]
        replies = _generate(
            generator, [requests[i] for i in asked], [rows[i].path for i in asked], batch_size
        )
        for i, reply in zip(asked, replies, strict=True):
            outcome, row = outcomes[i], rows[i]
            if not reply.is_cut and masks_only(row.answer, reply.text):
                outcome.masked, outcome.masked_by = reply.text, "model"
    for outcome, row in zip(outcomes, rows, strict=True):
        if not outcome.masked:
            rng = Random(f"{rules.seed}:{row.id}")
            masked = mask_by_rule(row.answer, rules.lexicon, rules.mask_rates, rng)
            outcome.masked_by = "rule" if rules.mask == "rule" else "rule after model"
            outcome.masked, outcome.reason = (masked, "") if masked else ("", "nothing to mask")
    return outcomes


def induce_group(
    rows: Sequence[SourceRow],
    outcomes: Sequence[Outcome],
    candidates: Sequence[Sequence[Candidate]],
    rules: Rules,
    generator: Generator,
    batch_size: int,
) -> None:
    """Fill ``outcomes``: the first candidate whose completion passes becomes the retrieved image
    (paper, 3.1).
    """
    open_rows = [i for i, outcome in enumerate(outcomes) if not outcome.reason]
    candidates = [*candidates]
    for i in open_rows:
        request = completion_request(rows[i].prompt, outcomes[i].masked)
        fitting = [each for each in candidates[i] if rules.fits(request, each.path)]
        outcomes[i].refused += [
            {"image": each.name, "reason": TOO_LONG, "completion": ""}
            for each in candidates[i]
            if each not in fitting
        ]
        candidates[i] = fitting
    for turn in range(max(map(len, candidates), default=0)):
        trying = [i for i in open_rows if turn < len(candidates[i])]
        completions = _generate(
            generator,
            [completion_request(rows[i].prompt, outcomes[i].masked) for i in trying],
            [candidates[i][turn].path for i in trying],
            batch_size,
        )
        similarities = (
            rules.similarity([rows[i].answer for i in trying], [said.text for said in completions])
            if trying
            else []
        )
        for i, completion, similarity in zip(trying, completions, similarities, strict=True):
            candidate, outcome = candidates[i][turn], outcomes[i]
            reason = refusal(rows[i].answer, outcome.masked, completion, similarity, rules)
            if reason:
                outcome.refused.append(
                    {"image": candidate.name, "reason": reason, "completion": completion.text}
                )
                continue
            outcome.completion, outcome.similarity = completion.text, round(similarity, 6)
            outcome.image, outcome.rank, outcome.cosine = (
                candidate.name,
                candidate.rank,
                round(candidate.cosine, 6),
            )
            open_rows.remove(i)
    for i in open_rows:
        refused = Counter(attempt["reason"] for attempt in outcomes[i].refused)
        outcomes[i].reason = (
            f"no candidate passed, mostly {refused.most_common(1)[0][0]}"
            if refused
            else "no candidate"
        )


def refusal(answer: str, masked: str, said: Answer, similarity: float, rules: Rules) -> str:
    """Why a completion is not a rejected answer; empty when it is one."""
    completion = said.text
    if said.is_cut:
        # half a sentence is a worse answer for a reason that has nothing to do with the image
        return "cut at max_new_tokens"
    if not completion:
        return "empty"
    if MASK_TOKEN in completion:
        return "mask left unfilled"
    if any(token in completion for token in (*rules.special, IMAGE_TOKEN) if token):
        return "special token"  # written out in ordinary tokens; training would refuse the row
    if completion == answer:
        return "identical"
    if rules.keep_unmasked and not fits_mask(masked, completion):
        return "unmasked words changed"
    if similarity >= rules.threshold:
        return "too similar"
    return ""


def _generate(
    generator: Generator, prompts: Sequence[str], paths: Sequence[Path], batch_size: int
) -> list[Answer]:
    answers: list[Answer] = []
    for start in range(0, len(prompts), batch_size):
        images = [
            decode_image(path.read_bytes(), path.name) for path in paths[start : start + batch_size]
        ]
        answers += generator(prompts[start : start + batch_size], images)
    return answers
