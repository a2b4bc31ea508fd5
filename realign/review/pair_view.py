"""A pair as the report's pages and `realign browse` show it: facts about how it was made, and both
answers with differing words marked.
"""

from __future__ import annotations

import difflib
import re
from collections.abc import Sequence
from dataclasses import dataclass
from math import isfinite
from typing import Any

from markupsafe import Markup, escape

from realign.data.records import Message, Record

MAX_WORDS = 4000  # the time of a comparison grows with the product of both lengths


@dataclass(frozen=True, slots=True)
class PairFacts:
    """Facts to sort and filter rows by; None if the row's ``meta`` lacks one.

    Attributes:
        id: Id of the row.
        similarity: Similarity of the two answers.
        cosine: Cosine of the two images' embeddings.
        rank: Rank of the retrieved image, from 1.
        words: Number of words of the chosen answer.
        rejected_words: Number of words of the rejected answer.
    """

    id: str
    similarity: float | None
    cosine: float | None
    rank: int | None
    words: int
    rejected_words: int

    @classmethod
    def of(cls, record: Record) -> PairFacts:
        """Read the facts from a record, which may lack its images."""
        rank = _number(record.meta, "retrieval", "rank")
        return cls(
            record.id,
            _number(record.meta, "similarity", "value"),
            _number(record.meta, "retrieval", "cosine"),
            None if rank is None else int(rank),
            len(record.chosen.split()),
            len(record.rejected.split()),
        )


@dataclass(frozen=True)
class PairView:
    """The marked texts of a pair, for a template; the page adds the images."""

    facts: PairFacts
    prompt: Sequence[Message]
    chosen: Markup
    rejected: Markup
    masked: str
    labels: Sequence[str]

    @classmethod
    def of(cls, record: Record) -> PairView:
        """Compare the answers of a record."""
        facts = PairFacts.of(record)
        chosen, rejected = word_diff(record.chosen, record.rejected)
        labels = []
        if facts.rank is not None:
            labels.append(f"rank {facts.rank}")
        if facts.cosine is not None:
            labels.append(f"cosine {facts.cosine:.3f}")
        if facts.similarity is not None:
            model = record.meta["similarity"].get("model")
            labels.append(f"similarity {facts.similarity:.2f}" + (f" ({model})" if model else ""))
        masked = record.meta.get("masked")
        return cls(
            facts,
            record.prompt,
            chosen,
            rejected,
            masked if isinstance(masked, str) else "",
            labels,
        )


def _number(meta: dict[str, Any], part: str, name: str) -> float | None:
    """Return a finite number from ``meta``, which may hold anything; None without one."""
    inner = meta.get(part)
    value = inner.get(name) if isinstance(inner, dict) else None
    if isinstance(value, bool) or not isinstance(value, int | float) or not isfinite(value):
        return None
    return value


def word_diff(chosen: str, rejected: str) -> tuple[Markup, Markup]:
    """Return both texts as HTML with differing words marked; very long texts are marked whole."""
    a, b = re.findall(r"\s+|\w+|[^\w\s]", chosen), re.findall(r"\s+|\w+|[^\w\s]", rejected)
    if max(len(a), len(b)) > MAX_WORDS:
        return marked(chosen, "kept"), marked(rejected, "lost")
    left, right = Markup(), Markup()
    for kind, a0, a1, b0, b1 in difflib.SequenceMatcher(None, a, b, autojunk=False).get_opcodes():
        left += marked("".join(a[a0:a1]), "kept" if kind != "equal" else "")
        right += marked("".join(b[b0:b1]), "lost" if kind != "equal" else "")
    return left, right


def marked(text: str, style: str) -> Markup:
    """Return the text as HTML, within a ``mark`` of this class unless class or text is empty."""
    if not style or not text.strip():
        return escape(text)
    return Markup('<mark class="{}">{}</mark>').format(style, text)
