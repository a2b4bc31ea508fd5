"""CHAIR: which objects of a caption are not in the image (Rohrbach et al. 2018), and which of the
image it names.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping

import numpy as np
from numpy.typing import NDArray

Counts = NDArray[
    np.float64
]  # (images, 4): objects named, of them absent, objects there, of them named


def mentioned(caption: str, synonyms: Mapping[str, list[str]]) -> set[str]:
    """Objects that a caption names, by whole words of their synonyms; plurals in s and es count."""
    text = caption.lower()
    return {
        name
        for name, words in synonyms.items()
        if any(re.search(rf"\b{re.escape(word.lower())}(?:e?s)?\b", text) for word in words)
    }


def caption_counts(
    caption: str, truth: Iterable[str], synonyms: Mapping[str, list[str]]
) -> list[int]:
    """Objects named, named but absent, present, present and named."""
    named, there = mentioned(caption, synonyms), set(truth)
    return [len(named), len(named - there), len(there), len(named & there)]


def chair_metrics(counts: Counts) -> Mapping[str, Counts]:
    """Metrics from summed counts.

    Args:
        counts: Shape ``(..., 4)``.
    Returns:
        chair_i: share of the named objects that are absent; recall: share of the objects there that
            are named.
    """
    named, absent, there, found = np.moveaxis(counts, -1, 0)
    with np.errstate(invalid="ignore", divide="ignore"):
        return {"chair_i": absent / named, "recall": found / there}
