"""Masks the answers of a group of rows: by a model with the paper's prompt, or by rule."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from random import Random
from typing import Literal

from realign.build.masking import Lexicon, mask_by_rule, masks_only
from realign.build.prompts import masking_request
from realign.build.row import SourceRow
from realign.generate.generator import Generator, Request

Fits = Callable[[str, Path], bool]  # whether a prompt about an image is short enough to be asked


@dataclass(frozen=True)
class Masked:
    """A masked answer.

    Attributes:
        text: The answer with ``[MASK]``; empty when nothing could be masked.
        by: ``rule``, ``model``, or ``rule after model``.
    """

    text: str
    by: str


@dataclass(frozen=True)
class MaskRules:
    """Settings of masking, as in BuildConfig."""

    mask: Literal["rule", "model"]
    lexicon: Lexicon
    rates: Mapping[str, float]
    seed: int


def mask_rows(
    rows: Sequence[SourceRow], rules: MaskRules, generator: Generator | None, fits: Fits
) -> list[Masked]:
    """Mask each answer. A model's mask that changes any other word falls back to the rule.

    Args:
        rows: Rows with answers.
        rules: How.
        generator: Who masks when ``rules.mask`` is ``model``.
        fits: Says which requests the generator can be asked.
    """
    by_model: dict[str, str] = {}
    if rules.mask == "model":
        assert generator is not None
        asked = [row for row in rows if fits(masking_request(row.answer), row.path)]
        replies = generator([Request(masking_request(row.answer), row.path) for row in asked])
        by_model = {
            row.id: reply.text
            for row, reply in zip(asked, replies, strict=True)
            if not reply.is_cut and not reply.problem and masks_only(row.answer, reply.text)
        }
    return [
        Masked(by_model[row.id], "model") if row.id in by_model else _by_rule(row, rules)
        for row in rows
    ]


def _by_rule(row: SourceRow, rules: MaskRules) -> Masked:
    rng = Random(f"{rules.seed}:{row.id}")
    masked = mask_by_rule(row.answer, rules.lexicon, rules.rates, rng)
    return Masked(masked or "", "rule" if rules.mask == "rule" else "rule after model")
