"""A warning of induced answers that have little to do with the chosen ones."""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping
from math import isfinite
from statistics import median
from typing import Any

# Lexical similarity of LLaVA-1.5's published answers to LLaVA-Bench and MM-Vet (272 of 7B, 272 of
# 13B). To different questions: median 0.00 to 0.02, 95 of 100 below 0.08. To the same one: median
# 0.33 to 0.43, 95 of 100 above 0.15. With 7 of 10 content words replaced: median 0.14 to 0.16.
UNRELATED = 0.1
FEWEST = 10  # pairs that a median says something about


def induced_similarities(metas: Iterable[Mapping[str, Any]]) -> list[float]:
    """Return the similarities in the provenance of rows whose rejected answer was induced."""
    found = []
    for meta in metas:
        similarity = meta.get("similarity")
        value = similarity.get("value") if isinstance(similarity, dict) else None
        if not isinstance(value, int | float) or not isfinite(value):
            continue
        if keeps_words(meta.get("masked") or ""):
            found.append(float(value))
    return found


def keeps_words(masked: str) -> bool:
    """Return whether a masked answer keeps a word. One that was masked as a whole, such as a single
    word, may be refilled with anything.
    """
    return re.search(r"\w", masked.replace("[MASK]", "")) is not None


def unrelated_answers(similarities: list[float]) -> str:
    """Return a warning if induced answers share next to nothing with the chosen ones, which an
    answer with a few refilled words does; else an empty text.

    Args:
        similarities: Similarities of chosen and rejected answers.
    """
    if len(similarities) < FEWEST or median(similarities) >= UNRELATED:
        return ""
    return (
        "the rejected answers share next to nothing with the chosen ones: the median similarity of "
        f"{len(similarities):,} pairs is {median(similarities):.2f}, as of answers to other "
        f"questions ({UNRELATED:g} and more is usual). The model may not know such pictures. Look "
        "at some pairs with `realign browse`; then set build.keep_unmasked=true, which refuses "
        "answers that changed other words than the masked ones, or align a model that knows them"
    )
