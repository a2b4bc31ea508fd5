"""Lexical similarity of two texts: by their words and pairs of neighbouring words."""

from __future__ import annotations

import re
from collections import Counter
from itertools import pairwise

# Words that carry no visual content: articles, auxiliaries, connectives.
FUNCTION_WORDS = frozenset(
    [
        *("a", "an", "the", "is", "are", "was", "were", "be", "been", "being", "there", "and"),
        *("or", "of", "to", "in", "on", "at", "by", "with", "it", "its", "this"),
    ]
)


def lexical(first: str, second: str) -> float:
    """Return the Dice coefficient of two texts' content words and pairs of neighbouring ones.

    Equal texts give 1. Because of the pairs the order matters: "red house, blue tree" and "blue
    house, red tree" differ.
    """
    a, b = _features(first), _features(second)
    total = a.total() + b.total()
    return 2 * (a & b).total() / total if total else float(first.strip() == second.strip())


def _features(text: str) -> Counter[tuple[str, ...]]:
    words = [word for word in re.findall(r"\w+", text.lower()) if word not in FUNCTION_WORDS]
    return Counter([(word,) for word in words] + list(pairwise(words)))
