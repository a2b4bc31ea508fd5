"""Masking of the answers of a group of rows: by a model with the paper's prompt, or by rule."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from random import Random
from typing import Literal

from realign.building.masking.lexicon import Lexicon
from realign.building.masking.masks import Level, mask_by_reply, mask_by_rule
from realign.building.prompts import MASK_REMINDERS, masking_request
from realign.data.formats.source_row import SourceRow
from realign.generation.generator import Generator, Request

Fits = Callable[[str, Path], bool]  # whether a prompt about an image is short enough

# values of Masked.by, which the funnel counts
BY_RULE, BY_RULE_AFTER_MODEL = "rule", "rule after model"
BY_MODEL = ("model", "model, 2nd try", "model, 3rd try", "model, 4th try")


@dataclass(frozen=True)
class Masked:
    """A masked answer.

    Attributes:
        text: The answer with ``[MASK]``; empty if nothing could be masked.
        by: One of ``BY_MODEL``, ``BY_RULE`` or ``BY_RULE_AFTER_MODEL``; empty for a row that
            already has its rejected answer.
    """

    text: str
    by: str


@dataclass(frozen=True)
class MaskRules:
    """Settings of masking, as in BuildConfig.

    Attributes:
        mask: Whether a model masks, or the rule.
        lexicon: Phrases that the rule masks.
        rates: Share of phrases that the rule masks, by category.
        seed: Seed of the choice of phrases.
        level: Whether to mask segments, or the sentences that contain them.
        retries: Number of retries when a model changed other words; each retry has another
            reminder of ``MASK_REMINDERS``.
    """

    mask: Literal["rule", "model"]
    lexicon: Lexicon
    rates: Mapping[str, float]
    seed: int
    level: Level = "segment"
    retries: int = 1

    def __post_init__(self) -> None:
        if not 0 <= self.retries <= len(MASK_REMINDERS):
            raise ValueError(
                f"retries must be in [0, {len(MASK_REMINDERS)}], one per reminder, got "
                f"{self.retries}."
            )


def mask_rows(
    rows: Sequence[SourceRow], rules: MaskRules, generator: Generator | None, fits: Fits
) -> list[Masked]:
    """Mask each answer. If a model changes any other word it is asked again, and at last the rule
    masks. A row that already has its rejected answer is not masked.

    Args:
        rows: Rows with answers.
        rules: Settings of masking.
        generator: The masking model if ``rules.mask`` is ``model``.
        fits: Function that tells whether a request is short enough for the generator.
    """
    masked = {i: Masked("", "") for i, row in enumerate(rows) if row.rejected}
    if rules.mask == "model":
        assert generator is not None
        for retry in range(rules.retries + 1):
            waiting = [i for i in range(len(rows)) if i not in masked]
            masked |= _by_model(rows, waiting, retry, rules.level, generator, fits)
    return [masked.get(i) or _by_rule(row, rules) for i, row in enumerate(rows)]


def _by_model(
    rows: Sequence[SourceRow],
    waiting: Sequence[int],
    retry: int,
    level: Level,
    generator: Generator,
    fits: Fits,
) -> dict[int, Masked]:
    """Ask the model once for each row of ``waiting``; return the usable masks by row."""
    prompts = {i: masking_request(rows[i].answer, retry) for i in waiting}
    asked = [i for i in waiting if fits(prompts[i], rows[i].path)]
    if not asked:
        return {}
    replies = generator([Request(prompts[i], rows[i].path) for i in asked])
    masked = {}
    for i, reply in zip(asked, replies, strict=True):
        if reply.is_cut or reply.problem:
            continue
        if text := mask_by_reply(rows[i].answer, reply.text, level):
            masked[i] = Masked(text, BY_MODEL[retry])
    return masked


def _by_rule(row: SourceRow, rules: MaskRules) -> Masked:
    rng = Random(f"{rules.seed}:{row.id}")
    masked = mask_by_rule(row.answer, rules.lexicon, rules.rates, rng, rules.level)
    return Masked(masked or "", BY_RULE if rules.mask == "rule" else BY_RULE_AFTER_MODEL)
