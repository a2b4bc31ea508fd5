"""Exact search for the largest cosines: tiles of the similarity matrix, never the whole of it.

A float32 product finds every row that may be among the best; those few are scored again in float64
with additions in one fixed order. So the answer is the same bits for any block size, number of
threads and BLAS library, and equal cosines come in corpus order.

Letters: **Q** queries of a block, **T** corpus rows of a tile, **D** size of a vector.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

# a tile of scores, 8 MB, stays in the cache between the product and what looks through it
QUERY_ROWS, CORPUS_ROWS = 1024, 2048
# multiplications from which a product goes to oneDNN
ONEDNN = 2**24
# numbers of a (pairs, D) block that is scored again, in float64
RESCORED = 2**20
# places of the running result of a query block: few queries at once where k is large
KEPT = 2**22
LOWEST = torch.finfo(torch.float32).min


class Others(NamedTuple):
    """Results of :meth:`ExactIndex.search_others`.

    Attributes:
        cosines, indices: Shape ``(queries, min(k, images))``, best first; ``-inf`` and -1 where
            fewer are left.
        above: For each query how many images are above the bound, the skipped ones not among them.
        skipped: Products of the skipped pairs, off by at most :func:`product_error`.
    """

    cosines: Tensor
    indices: Tensor
    above: Tensor
    skipped: Tensor


class ExactIndex:
    """Exact top-k over rows of length 1 that stay where they are; nothing is copied or built.

    Args:
        embeddings: Shape ``(images, D)``, float32 or float16, on the CPU.
        query_rows: Queries of a block.
        corpus_rows: Corpus rows of a tile. Neither changes the answer.
    """

    name = "exact"

    def __init__(
        self, embeddings: Tensor, *, query_rows: int = QUERY_ROWS, corpus_rows: int = CORPUS_ROWS
    ) -> None:
        self.embeddings = embeddings
        self.query_rows = query_rows
        self.corpus_rows = corpus_rows

    def __len__(self) -> int:
        return len(self.embeddings)

    @torch.no_grad()
    def search(self, queries: Tensor, k: int) -> tuple[Tensor, Tensor]:
        """Return the ``k`` largest cosines of each query, best first, equal ones in corpus order.

        Args:
            queries: Rows of length 1, shape ``(queries, D)``.
            k: How many; fewer where the corpus has fewer.
        Returns:
            cosines, indices: Shape ``(queries, min(k, images))``, float32 and int64.
        """
        none = torch.empty(0, dtype=torch.int64)
        found = self.search_others(queries, k, none, none)
        return found.cosines, found.indices

    @torch.no_grad()
    def search_others(
        self, queries: Tensor, k: int, rows: Tensor, images: Tensor, most: float | None = None
    ) -> Others:
        """Search among the images that are not skipped and not above a bound, in the time of a
        search among all.

        Args:
            queries: Rows of length 1, shape ``(queries, D)``.
            k: How many.
            rows, images: Pairs to skip, each once, in order of ``rows``, which number the queries.
            most: The largest cosine, as float32, that is found.
        """
        k = min(k, len(self))
        cosines = torch.empty(len(queries), k)
        indices = torch.empty(len(queries), k, dtype=torch.int64)
        above = torch.zeros(len(queries), dtype=torch.int64)
        products = torch.empty(len(rows))
        size = max(1, min(self.query_rows, KEPT // max(k, 1)))
        for start in range(0, len(queries) if k else 0, size):
            block = slice(start, start + size)
            first, last = torch.searchsorted(rows, torch.tensor([start, start + size])).tolist()
            asked, pairs = queries[block], slice(first, last)
            mask = _Mask(asked, self.embeddings, rows[pairs] - start, images[pairs], most)
            cosines[block], indices[block] = self._search_block(asked, k, mask)
            above[block], products[pairs] = mask.above, mask.products()
        return Others(cosines, indices, above, products)

    def _search_block(self, queries: Tensor, k: int, mask: _Mask) -> tuple[Tensor, Tensor]:
        best = torch.full((len(queries), k), -torch.inf, dtype=torch.float64)
        indices = torch.full((len(queries), k), -1)
        product = _Product(queries.float())
        error = product_error(queries.shape[1])
        for start in range(0, len(self), self.corpus_rows):
            scores = product(self.embeddings[start : start + self.corpus_rows].float())
            mask.apply(scores, start)
            # whoever is among the best scores at least this; the k-th best so far counts exactly
            least = best[:, -1].sub(error).float().clamp(min=LOWEST)  # -inf is what is masked
            rows = (scores.amax(1) >= least).nonzero()[:, 0]
            if not len(rows):
                continue
            scores, least = scores[rows], least[rows, None]
            if scores.shape[1] > k:  # the tile's own k-th is off by one error, a rival by another
                least = least.maximum(scores.topk(k, dim=1).values[:, -1:] - 2 * error)
            place, found = (scores >= least).nonzero(as_tuple=True)
            found += start
            exact = pair_cosines(queries, self.embeddings, rows[place], found)
            _merge(best, indices, rows, place, found, exact)
        return best.float(), indices


class _Mask:
    """Takes out of the tiles of a query block what is skipped and what is above a bound."""

    def __init__(
        self, queries: Tensor, corpus: Tensor, rows: Tensor, images: Tensor, most: float | None
    ) -> None:
        self.queries, self.corpus = queries, corpus
        self.order = images.argsort(stable=True)  # the pairs of a tile stand together
        self.rows, self.images = rows[self.order], images[self.order]
        self.met = torch.empty(len(rows))
        self.most = None if most is None else float(torch.tensor(most))
        self.error = product_error(queries.shape[1])
        self.above = torch.zeros(len(queries), dtype=torch.int64)

    def products(self) -> Tensor:
        """Return the scores of the skipped pairs, in the order in which these were given."""
        return torch.empty(len(self.met)).index_copy_(0, self.order, self.met)

    def apply(self, scores: Tensor, start: int) -> None:
        """Set the scores of a tile that starts at row ``start`` to ``-inf`` where it is masked."""
        if len(self.images):
            ends = torch.tensor([start, start + scores.shape[1]])
            part = slice(*torch.searchsorted(self.images, ends).tolist())
            rows, columns = self.rows[part], self.images[part] - start
            self.met[part] = scores[rows, columns]
            scores[rows, columns] = -torch.inf
        if self.most is None:
            return
        is_above = scores > self.most - self.error
        # within the product's error float64 decides
        rows, columns = (is_above & (scores <= self.most + self.error)).nonzero(as_tuple=True)
        exact = pair_cosines(self.queries, self.corpus, rows, columns + start)
        is_above[rows, columns] = exact.float() > self.most
        self.above += is_above.sum(1)
        scores.masked_fill_(is_above, -torch.inf)


class _Product:
    """Scores of a query block against tiles: large ones by oneDNN where torch has it, whose float32
    product uses the widest vectors of any processor; MKL does not. It wakes all threads for any
    product, which small ones do not repay.
    """

    def __init__(self, queries: Tensor) -> None:
        self.queries = queries
        self.packed = queries.to_mkldnn() if torch.backends.mkldnn.is_available() else None

    def __call__(self, tile: Tensor) -> Tensor:
        """Return shape ``(Q, T)``."""
        if self.packed is None or self.queries.numel() * len(tile) < ONEDNN:
            return F.linear(self.queries, tile)
        return F.linear(self.packed, tile.to_mkldnn()).to_dense()


def product_error(size: int) -> float:
    """Return a bound of the rounding error of a float32 product of two vectors of length about 1.

    ``D * 2**-24`` for any order of additions, doubled for lengths that are not quite 1.
    """
    error = (size + 2) * 2.0**-23
    if torch.get_float32_matmul_precision() != "highest":
        error += 2.0**-7  # both factors rounded to bfloat16
    return error


def pair_cosines(queries: Tensor, corpus: Tensor, rows: Tensor, found: Tensor) -> Tensor:
    """Return products of row pairs in float64, added by halving: the same bits in any place.

    Args:
        queries, corpus: Shape ``(*, D)``.
        rows, found: Row numbers in ``queries`` and ``corpus``, shape ``(pairs,)``.
    Returns:
        Shape ``(pairs,)``, float64.
    """
    step = max(1, RESCORED // queries.shape[1])
    cosines = torch.empty(len(rows), dtype=torch.float64)
    for start in range(0, len(rows), step):
        part = slice(start, start + step)
        terms = queries[rows[part]].double() * corpus[found[part]]
        while (size := terms.shape[1]) > 1:
            half = (size + 1) // 2
            terms[:, : size - half] += terms[:, half:]
            terms = terms[:, :half]
        cosines[part] = terms[:, 0]
    return cosines


def _merge(
    best: Tensor, indices: Tensor, rows: Tensor, place: Tensor, found: Tensor, exact: Tensor
) -> None:
    """Take candidates into the running result of ``rows``; ``place`` numbers them and ascends.

    The kept come first and tiles come in corpus order, so a stable sort leaves equals in it.
    """
    k = best.shape[1]
    counts = torch.bincount(place, minlength=len(rows))
    column = torch.arange(len(place)) - (counts.cumsum(0) - counts)[place]
    width = k + int(counts.max())
    cosines = torch.full((len(rows), width), -torch.inf, dtype=torch.float64)
    numbers = torch.full((len(rows), width), -1)
    cosines[:, :k], numbers[:, :k] = best[rows], indices[rows]
    cosines[place, k + column], numbers[place, k + column] = exact, found
    order = cosines.sort(dim=1, descending=True, stable=True)
    best[rows] = order.values[:, :k]
    indices[rows] = numbers.gather(1, order.indices[:, :k])
