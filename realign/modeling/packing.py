"""Where the answers of a micro-batch lie in its rows: the layouts that collator, model and loss
share.

``separate`` has one padded row a cell, as every trainer has it. ``shared prefix`` has one row for
all: ``[v, x | y_w | y_l]`` of every pair and then ``[v_l, x | y_w]``, one after the other without
padding. The image and the prompt are computed once for both answers; attention
(:mod:`realign.modeling.packed_attention`) lets no answer see another.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import accumulate
from typing import Literal

Layout = Literal["shared prefix", "separate"]


@dataclass(frozen=True, slots=True)
class SharedRow:
    """A prefix and the answers that follow it, as they lie in the packed row.

    Attributes:
        start: Index of the prefix's first token.
        prefix: Tokens of the prefix: images and prompt.
        answers: Tokens of every answer, the longest first. Each stands, for attention and
            positions, where the first one stands, so that what the first one's slots say of
            positions and token types is true of all.
    """

    start: int
    prefix: int
    answers: tuple[int, ...]

    @property
    def answer_starts(self) -> tuple[int, ...]:
        """Index of every answer's first token."""
        return tuple(accumulate(self.answers[:-1], initial=self.start + self.prefix))

    @property
    def end(self) -> int:
        """Index after the last token."""
        return self.start + self.prefix + sum(self.answers)

    def predicting(self, answer: int) -> list[int]:
        """Index of the token that predicts each token of an answer. The last token of the prefix
        predicts the first one of every answer.
        """
        start = self.answer_starts[answer]
        last_of_prefix = self.start + self.prefix - 1
        return [last_of_prefix, *range(start, start + self.answers[answer] - 1)]


@dataclass(frozen=True, slots=True)
class Packing:
    """Layout of one packed row, and what about it is read on the host.

    Attributes:
        rows: The shared rows, in order, without gaps.
    """

    rows: tuple[SharedRow, ...]

    @classmethod
    def of(cls, lengths: Sequence[tuple[int, Sequence[int]]]) -> Packing:
        """Lay out rows of (tokens of the prefix, tokens of its answers, the longest first)."""
        rows: list[SharedRow] = []
        for prefix, answers in lengths:
            if sorted(answers, reverse=True) != list(answers):
                raise ValueError(f"answers must be sorted, the longest first, got {answers}.")
            rows.append(SharedRow(rows[-1].end if rows else 0, prefix, tuple(answers)))
        return cls(tuple(rows))
