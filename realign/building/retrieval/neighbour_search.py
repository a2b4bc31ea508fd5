"""Search for the nearest images of each query that do not show the same picture.

The index returns short lists. A query whose list is exhausted, for example because it has many
duplicates, is searched again exactly, without the images that the rule excludes.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence

import numpy as np
import torch

from realign.building.retrieval.exact import ExactIndex, pair_cosines, product_error
from realign.building.retrieval.index import Index
from realign.building.retrieval.neighbours import Neighbours, Rule

# number of queries that are searched together
BLOCK = 4096
# number of list entries that are processed at once, and of pairs that are skipped at once
PLACES = 2**22
# number of images beyond k in the first list of a query
SPARE = 8


class NeighbourSearch:
    """Search for the neighbours of a corpus's own images.

    Args:
        index: Index over the corpus.
        digests: Content hash of every image of the corpus; equal hashes are one picture.
        rule: The rule for neighbours.
        hashes: Perceptual hash of every image of the corpus, uint64, shape ``(images,)``; required
            if ``rule.max_hamming`` is set.
    Raises:
        ValueError: There is not one digest or hash per image.
    """

    def __init__(
        self,
        index: Index,
        digests: Iterable[str],
        rule: Rule,
        hashes: np.ndarray | None = None,
    ) -> None:
        self.pictures = _numbered(digests)
        if len(self.pictures) != len(index):
            raise ValueError(
                f"digests must be one for each image, {len(index)}, got {len(self.pictures)}."
            )
        if rule.max_hamming is not None and (
            hashes is None or hashes.shape != (len(index),) or hashes.dtype != np.uint64
        ):
            got = "none" if hashes is None else f"{hashes.dtype} of shape {hashes.shape}"
            raise ValueError(
                f"hashes must be uint64 of shape ({len(index)},) to compare them, got {got}."
            )
        self.index, self.rule, self.hashes = index, rule, hashes
        self.exact = ExactIndex(index.embeddings)
        first = rule.k + 1 + SPARE
        self.depths = [first, 4 * first, 16 * first]
        if isinstance(index, ExactIndex):  # longer lists take as long as the exact search below
            self.depths = [first] if rule.max_cosine is None else []

    def find(self, queries: Sequence[int] | np.ndarray) -> Neighbours:
        """Return the ``rule.k`` nearest other images of each query that the rule permits.

        The result for a query does not depend on the other queries.

        Args:
            queries: Row numbers of the corpus.
        """
        rows = np.asarray(queries, dtype=np.int64)
        k = self.rule.k
        found = Neighbours(np.full((len(rows), k), -1), np.full((len(rows), k), np.nan, np.float32))
        for start in range(0, len(rows), BLOCK):
            places = np.arange(start, min(start + BLOCK, len(rows)))
            for depth in self.depths:
                step = max(1, PLACES // min(depth, len(self.index)))
                parts = [places[i : i + step] for i in range(0, len(places), step)]
                places = np.concatenate(
                    [places[:0], *(self._look(found, rows, part, depth) for part in parts)]
                )
            self._search_rest(found, rows, places)
        return found

    def _look(
        self, found: Neighbours, rows: np.ndarray, places: np.ndarray, depth: int
    ) -> np.ndarray:
        """Take neighbours from the index's lists; return the queries whose list is too short."""
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
        # if the last image of a list is too far, so are all after it
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
            is_met &= ~is_excluded  # only the first reason of an image counts
        is_below = np.any((indices >= 0) & ~is_near, axis=1)
        _count_short(found, is_done & ~is_complete, is_below)
        return places[~is_done]

    def _reasons(
        self, queries: np.ndarray, cosines: np.ndarray, indices: np.ndarray
    ) -> dict[str, np.ndarray]:
        """Return, by reason, which images of the lists are excluded; the strongest reason first."""
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

    def _search_rest(self, found: Neighbours, rows: np.ndarray, places: np.ndarray) -> None:
        """Find the neighbours of queries by a search without the excluded images."""
        waiting: list[tuple[np.ndarray, np.ndarray]] = []  # images that show a query's picture
        start = num_pairs = 0
        for stop, (query, image) in self._twins(rows[places]):
            waiting.append((query - start, image))
            num_pairs += len(query)
            if num_pairs >= PLACES or stop == len(places):
                pairs = [np.concatenate(part) for part in zip(*waiting, strict=True)]
                self._search(found, rows, places[start:stop], pairs[0], pairs[1])
                waiting, start, num_pairs = [], stop, 0

    def _twins(self, queries: np.ndarray) -> Iterator[tuple[int, tuple[np.ndarray, np.ndarray]]]:
        """Yield the number of queries so far, and pairs of a query's place and an image that shows
        the same picture, the query itself included.
        """
        step = max(1, PLACES // max(len(self.index), 1))
        for start in range(0, len(queries), step):
            part = queries[start : start + step, None]
            is_same = self.pictures == self.pictures[part]
            if self.rule.max_hamming is not None and self.hashes is not None:
                is_same |= (
                    np.bitwise_count(self.hashes ^ self.hashes[part]) <= self.rule.max_hamming
                )
            query, image = is_same.nonzero()
            yield start + len(part), (query + start, image)

    def _search(
        self,
        found: Neighbours,
        rows: np.ndarray,
        places: np.ndarray,
        query: np.ndarray,
        image: np.ndarray,
    ) -> None:
        rule, corpus = self.rule, self.index.embeddings
        asked = corpus[torch.from_numpy(rows[places])]
        pairs = torch.from_numpy(query), torch.from_numpy(image)
        searched = self.exact.search_others(asked, rule.k, *pairs, rule.max_cosine)
        cosines, indices = searched.cosines.numpy(), searched.indices.numpy()
        is_near = indices >= 0
        if rule.min_cosine is not None:
            is_near &= cosines >= rule.min_cosine
        at, column = is_near.nonzero()
        found.indices[places[at], column] = indices[at, column]
        found.cosines[places[at], column] = cosines[at, column]
        is_complete = is_near.sum(axis=1) >= rule.k
        is_met = self._met(asked, indices, is_complete, query, image, searched.skipped.numpy())
        is_byte = self.pictures[rows[places][query]] == self.pictures[image]
        is_other = is_met & (rows[places][query] != image)
        for name, count in (
            ("byte_duplicate", is_other & is_byte),
            ("near_duplicate", is_other & ~is_byte),
            ("above_max_cosine", searched.above.numpy()),
        ):
            if total := int(count.sum()):
                found.excluded[name] += total
        is_below = np.any((indices >= 0) & ~is_near, axis=1)
        is_below[query[~is_met]] = True
        _count_short(found, ~is_complete, is_below)

    def _met(
        self,
        asked: torch.Tensor,
        indices: np.ndarray,
        is_complete: np.ndarray,
        query: np.ndarray,
        image: np.ndarray,
        products: np.ndarray,
    ) -> np.ndarray:
        """Return which skipped pairs come before the last accepted image, or are near enough if a
        query has fewer than k. Within the error of the products, float64 decides.
        """
        low = self.rule.min_cosine
        limit = np.full(len(asked), -np.inf if low is None else np.float32(low), np.float64)
        last = np.full(len(asked), -1)
        full = is_complete.nonzero()[0]
        last[full] = indices[full, -1]
        corpus = self.index.embeddings
        limit[full] = pair_cosines(
            asked, corpus, torch.from_numpy(full), torch.from_numpy(last[full])
        ).numpy()
        is_met = products > limit[query]
        open_ = (np.abs(products - limit[query]) <= product_error(asked.shape[1])).nonzero()[0]
        of, those = query[open_], image[open_]
        exact = pair_cosines(asked, corpus, torch.from_numpy(of), torch.from_numpy(those)).numpy()
        is_before = (exact > limit[of]) | ((exact == limit[of]) & (those < last[of]))
        is_met[open_] = np.where(
            is_complete[of], is_before, exact.astype(np.float32) >= limit[of].astype(np.float32)
        )
        return is_met


def _count_short(found: Neighbours, is_short: np.ndarray, is_below: np.ndarray) -> None:
    for name, those in (
        ("below_min_cosine", is_short & is_below),
        ("no_more_images", is_short & ~is_below),
    ):
        if count := int(those.sum()):
            found.short[name] += count


def _numbered(digests: Iterable[str]) -> np.ndarray:
    """Return digests as numbers by first appearance, which compare faster than texts."""
    numbers: dict[str, int] = {}
    return np.fromiter((numbers.setdefault(digest, len(numbers)) for digest in digests), np.int64)
