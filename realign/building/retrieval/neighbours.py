"""The rule for images that may replace another one, and the ones that were found."""

from __future__ import annotations

from collections import Counter
from dataclasses import dataclass, field

import numpy as np

from realign.errors import RefusedError

# why an image was passed over, strongest first, and why a query has fewer than it may
EXCLUDED = ("byte_duplicate", "near_duplicate", "above_max_cosine")
SHORT = ("below_min_cosine", "no_more_images")
REASONS = (*EXCLUDED, *SHORT)


@dataclass(frozen=True)
class Rule:
    """The number of images to find, and the rule for those that are passed over.

    Args:
        k: Images for each query.
        min_cosine: The least cosine that is near enough; none is no limit.
        max_cosine: The largest cosine that is not too near; none is no limit.
        max_hamming: Perceptual hashes of 64 bits that differ in at most this many are one picture;
            none compares no hashes.
    Raises:
        RefusedError: A value that no image can meet.
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
    """The accepted images of every query, and what was passed over.

    ``indices`` and ``cosines`` have shape ``(queries, k)``, best first; where a query has fewer
    the rest is -1 and NaN. ``excluded`` counts the images met before a query had its k, by reason
    of ``EXCLUDED``. ``short`` counts the queries that have fewer than k: ``below_min_cosine``, or
    ``no_more_images`` (of the corpus, or that an approximate index finds).
    """

    indices: np.ndarray
    cosines: np.ndarray
    excluded: Counter[str] = field(default_factory=Counter)
    short: Counter[str] = field(default_factory=Counter)
