"""The rule for neighbours of an image, and the neighbours that were found."""

from __future__ import annotations

from collections import Counter
from dataclasses import dataclass, field

import numpy as np

from realign.errors import RefusedError

# reasons why an image is excluded, the strongest first, and why a query has fewer than k
EXCLUDED = ("byte_duplicate", "near_duplicate", "above_max_cosine")
SHORT = ("below_min_cosine", "no_more_images")
REASONS = (*EXCLUDED, *SHORT)


@dataclass(frozen=True)
class Rule:
    """The number of images to find, and the rule for those that are excluded.

    Args:
        k: Number of images per query.
        min_cosine: Smallest cosine of a neighbour; None for no limit.
        max_cosine: Largest cosine of a neighbour; None for no limit.
        max_hamming: Largest number of differing bits, of 64, of the perceptual hashes of one
            picture; None compares no hashes.
    Raises:
        RefusedError: No image can meet the rule.
    """

    k: int = 10
    min_cosine: float | None = None
    max_cosine: float | None = None
    max_hamming: int | None = None

    def __post_init__(self) -> None:
        if self.k < 1:
            raise RefusedError(f"k must be at least 1, got {self.k}. Raise it.")
        if self.max_hamming is not None and not 0 <= self.max_hamming < 64:
            raise RefusedError(f"max_hamming must be 0 to 63, got {self.max_hamming}. Lower it.")
        low, high = self.min_cosine, self.max_cosine
        for name, value in (("min_cosine", low), ("max_cosine", high)):
            if value is not None and not -1 <= value <= 1:
                raise RefusedError(f"{name} must be -1 to 1, got {value}. Correct it.")
        if low is not None and high is not None and low > high:
            raise RefusedError(
                f"min_cosine must be at most max_cosine {high}, got {low}. Lower it."
            )


@dataclass(frozen=True)
class Neighbours:
    """The neighbours of every query, and counts of excluded images.

    Attributes:
        indices: Row numbers of the neighbours, shape ``(queries, k)``, the best first; -1 if a
            query has fewer.
        cosines: Their cosines; NaN if a query has fewer.
        excluded: Number of excluded images that came before a query had its k, by reason of
            ``EXCLUDED``.
        short: Number of queries with fewer than k neighbours: ``below_min_cosine``, or
            ``no_more_images`` (in the corpus, or found by an approximate index).
    """

    indices: np.ndarray
    cosines: np.ndarray
    excluded: Counter[str] = field(default_factory=Counter)
    short: Counter[str] = field(default_factory=Counter)
