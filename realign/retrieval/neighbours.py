"""The images that may replace another one: the nearest that are not the same picture again."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field

import numpy as np
import torch

from realign.errors import RefusedError
from realign.retrieval.index import Index

# queries searched together; more when their lists are short
BLOCK = 4096
# places of the lists looked through at once
PLACES = 2**22
# looked at beyond k before the index is asked again
SPARE = 8


@dataclass(frozen=True)
class Rule:
    """How many images are wanted and which are passed over.

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
class Neighbour:
    """A row of the corpus; ``rank`` counts the accepted ones of its query from 1."""

    index: int
    cosine: float
    rank: int


@dataclass(frozen=True)
class Neighbours:
    """The accepted images of every query, and what was passed over.

    ``indices`` and ``cosines`` have shape ``(queries, k)``, best first; where a query has fewer
    the rest is -1 and NaN. ``excluded`` counts the images met before a query had its k, by reason:
    ``byte_duplicate``, ``near_duplicate``, ``above_max_cosine``. ``short`` counts the queries that
    have fewer than k: ``below_min_cosine``, or ``no_more_images`` (of the corpus, or that an
    approximate index finds).
    """

    indices: np.ndarray
    cosines: np.ndarray
    excluded: Counter[str] = field(default_factory=Counter)
    short: Counter[str] = field(default_factory=Counter)

    def of(self, query: int) -> list[Neighbour]:
        """Return the accepted images of one query."""
        return [
            Neighbour(index, cosine, rank)
            for rank, (index, cosine) in enumerate(
                zip(self.indices[query].tolist(), self.cosines[query].tolist(), strict=True), 1
            )
            if index >= 0
        ]


def find_neighbours(
    index: Index,
    queries: Sequence[int] | np.ndarray,
    digests: Iterable[str],
    rule: Rule,
    hashes: np.ndarray | None = None,
) -> Neighbours:
    """Return the ``rule.k`` nearest other images of each query that the rule lets pass.

    The index is asked for more until every query has its k, or no image is left for it. A query
    is answered the same whatever others are asked with it.

    Args:
        index: Over the corpus.
        queries: Row numbers of the corpus.
        digests: Content hash of every image of the corpus; equal ones are one picture.
        rule: What to accept.
        hashes: Perceptual hash of every image of the corpus, uint64, shape ``(images,)``; needed
            where ``rule.max_hamming`` is given.
    Raises:
        ValueError: Digests or hashes are not one for each image.
    """
    rows = np.asarray(queries, dtype=np.int64)
    search = _Search(index, rule, _numbered(digests), hashes)
    found = Neighbours(
        np.full((len(rows), rule.k), -1), np.full((len(rows), rule.k), np.nan, np.float32)
    )
    for start in range(0, len(rows), BLOCK):
        places = np.arange(start, min(start + BLOCK, len(rows)))
        depth = rule.k + 1 + SPARE
        while len(places):
            step = max(1, PLACES // min(depth, len(index)))
            parts = [places[i : i + step] for i in range(0, len(places), step)]
            places = np.concatenate([search.fill(found, rows, part, depth) for part in parts])
            depth *= 4
    return found


class _Search:
    def __init__(
        self, index: Index, rule: Rule, pictures: np.ndarray, hashes: np.ndarray | None
    ) -> None:
        if len(pictures) != len(index):
            raise ValueError(
                f"digests must be one for each image, {len(index)}, got {len(pictures)}."
            )
        if rule.max_hamming is not None and (
            hashes is None or hashes.shape != (len(index),) or hashes.dtype != np.uint64
        ):
            got = "none" if hashes is None else f"{hashes.dtype} of shape {hashes.shape}"
            raise ValueError(
                f"hashes must be uint64 of shape ({len(index)},) to compare them, got {got}."
            )
        self.index = index
        self.rule = rule
        self.pictures = pictures
        self.hashes = hashes

    def fill(
        self, found: Neighbours, rows: np.ndarray, places: np.ndarray, depth: int
    ) -> np.ndarray:
        """Look ``depth`` images deep for some queries; return those that must look deeper."""
        rule = self.rule
        queries = rows[places]
        searched = self.index.search(self.index.embeddings[torch.from_numpy(queries)], depth)
        cosines, indices = searched[0].numpy(), searched[1].numpy()
        is_near = indices >= 0
        if rule.min_cosine is not None:
            is_near &= cosines >= rule.min_cosine
        reasons = self._reasons(queries, cosines, indices)
        is_accepted = is_near & ~np.logical_or.reduce([*reasons.values()])
        rank = is_accepted.cumsum(axis=1)
        # the last image of a list tells whether there is anything behind it
        is_complete = rank[:, -1] >= rule.k
        is_cut = ~is_near[:, -1]
        is_done = is_complete | is_cut | (depth >= len(self.index))
        taken = is_accepted & (rank <= rule.k) & is_done[:, None]
        query, column = taken.nonzero()
        to = places[query], rank[query, column] - 1
        found.indices[to], found.cosines[to] = indices[query, column], cosines[query, column]
        is_met = is_near & (rank < rule.k) & is_done[:, None]
        for name, is_excluded in reasons.items():
            if name != "self" and (count := int((is_met & is_excluded).sum())):
                found.excluded[name] += count
            is_met &= ~is_excluded  # one reason an image, the first
        is_short = is_done & ~is_complete
        is_below = is_short & ((indices >= 0) & ~is_near).any(axis=1)
        for name, those in (
            ("below_min_cosine", is_below),
            ("no_more_images", is_short & ~is_below),
        ):
            if count := int(those.sum()):
                found.short[name] += count
        return places[~is_done]

    def _reasons(
        self, queries: np.ndarray, cosines: np.ndarray, indices: np.ndarray
    ) -> dict[str, np.ndarray]:
        """Why each image of the lists is passed over, strongest reason first."""
        reasons = {
            "self": indices == queries[:, None],
            "byte_duplicate": self.pictures[indices] == self.pictures[queries, None],
        }
        if self.rule.max_hamming is not None and self.hashes is not None:
            apart = np.bitwise_count(self.hashes[indices] ^ self.hashes[queries, None])
            reasons["near_duplicate"] = apart <= self.rule.max_hamming
        if self.rule.max_cosine is not None:
            reasons["above_max_cosine"] = cosines > self.rule.max_cosine
        return reasons


def _numbered(digests: Iterable[str]) -> np.ndarray:
    """Number digests by first appearance; numbers compare faster and take less than texts."""
    numbers: dict[str, int] = {}
    return np.fromiter((numbers.setdefault(digest, len(numbers)) for digest in digests), np.int64)
