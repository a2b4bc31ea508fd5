"""Exact search for the largest cosines, in tiles of the similarity matrix.

A float32 product finds every row that may be among the best. Those few are scored again in float64,
with additions in a fixed order. The result is therefore bit-identical for any block size, number of
threads and BLAS library, and equal cosines are in corpus order.

Letters: **Q** queries of a block, **T** corpus rows of a tile, **D** size of a vector.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

# a tile of scores has 8 MB, which stay in the cache between product and selection
QUERY_ROWS, CORPUS_ROWS = 1024, 2048
# number of multiplications from which oneDNN computes a product
ONEDNN = 2**24
# size of a (pairs, D) block that is scored again in float64
RESCORED = 2**20
# size of the running result of a query block, which has fewer queries if k is large
KEPT = 2**22
LOWEST = torch.finfo(torch.float32).min


class Others(NamedTuple):
    """Results of :meth:`ExactIndex.search_others`.

    Attributes:
        cosines, indices: Shape ``(queries, min(k, images))``, the best first; ``-inf`` and -1 if
            there are fewer images.
        above: Number of images above the bound for each query, without the skipped ones.
        skipped: Products of the skipped pairs, with an error of at most :func:`product_error`.
    """

    cosines: Tensor
    indices: Tensor
    above: Tensor
    skipped: Tensor


class ExactIndex:
    """Exact top-k search over rows of length 1, without copies or an index.

    Args:
        embeddings: Rows of shape ``(images, D)``, float32 or float16, on the CPU.
        query_rows: Number of queries of a block; it does not change the result.
        corpus_rows: Number of corpus rows of a tile; it does not change the result.
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
            k: Number of images to find per query; fewer if the corpus has fewer.
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
        """Search among the images that are neither skipped nor above a bound, in the time of a
        search among all images.

        Args:
            queries: Rows of length 1, shape ``(queries, D)``.
            k: Number of images to find per query.
            rows, images: Pairs of query and image to skip, each once, in order of ``rows``.
            most: Largest cosine, as float32, that may be found; None for no bound.
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
            # the best images score at least this; the k-th best so far is known exactly
            least = best[:, -1].sub(error).float().clamp(min=LOWEST)  # above -inf, which is masked
            rows = (scores.amax(1) >= least).nonzero()[:, 0]
            if not len(rows):
                continue
            scores, least = scores[rows], least[rows, None]
            # the tile's k-th best score and its rival may both be off by an error
            if scores.shape[1] > k:
                least = least.maximum(scores.topk(k, dim=1).values[:, -1:] - 2 * error)
            place, found = (scores >= least).nonzero(as_tuple=True)
            found += start
            exact = pair_cosines(queries, self.embeddings, rows[place], found)
            _merge(best, indices, rows, place, found, exact)
        return best.float(), indices


class _Mask:
    """Mask for the tiles of a query block: skipped pairs, and images above a bound."""

    def __init__(
        self, queries: Tensor, corpus: Tensor, rows: Tensor, images: Tensor, most: float | None
    ) -> None:
        self.queries, self.corpus = queries, corpus
        self.order = images.argsort(stable=True)  # puts the pairs of a tile together
        self.rows, self.images = rows[self.order], images[self.order]
        self.met = torch.empty(len(rows))
        self.most = None if most is None else float(torch.tensor(most))
        self.error = product_error(queries.shape[1])
        self.above = torch.zeros(len(queries), dtype=torch.int64)

    def products(self) -> Tensor:
        """Return the scores of the skipped pairs, in their original order."""
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
        # within the error of the product, float64 decides
        rows, columns = (is_above & (scores <= self.most + self.error)).nonzero(as_tuple=True)
        exact = pair_cosines(self.queries, self.corpus, rows, columns + start)
        is_above[rows, columns] = exact.float() > self.most
        self.above += is_above.sum(1)
        scores.masked_fill_(is_above, -torch.inf)


class _Product:
    """Products of a query block with tiles. oneDNN computes large ones if torch has it, because
    its float32 product uses the widest vectors of every processor and MKL's does not. It wakes all
    threads, which does not pay for small products.
    """

    def __init__(self, queries: Tensor) -> None:
        self.queries = queries
        self.packed = queries.to_mkldnn() if torch.backends.mkldnn.is_available() else None

    def __call__(self, tile: Tensor) -> Tensor:
        """Return the scores of a tile, shape ``(Q, T)``."""
        if self.packed is None or self.queries.numel() * len(tile) < ONEDNN:
            return F.linear(self.queries, tile)
        return F.linear(self.packed, tile.to_mkldnn()).to_dense()


def product_error(size: int) -> float:
    """Return a bound on the rounding error of a float32 product of two vectors of length about 1.

    It is ``D * 2**-24`` for any order of additions, doubled because lengths are not exactly 1.
    """
    error = (size + 2) * 2.0**-23
    if torch.get_float32_matmul_precision() != "highest":
        error += 2.0**-7  # both factors rounded to bfloat16
    return error


def pair_cosines(queries: Tensor, corpus: Tensor, rows: Tensor, found: Tensor) -> Tensor:
    """Return products of row pairs in float64, summed by halving, which gives the same bits in any
    place.

    Args:
        queries, corpus: Rows of shape ``(*, D)``.
        rows, found: Row numbers in ``queries`` and ``corpus``, shape ``(pairs,)``.
    Returns:
        Products of shape ``(pairs,)``, float64.
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
    """Merge candidates into the running result of ``rows``; ``place`` is their index in ``rows``,
    in ascending order.

    Earlier results come first and tiles are in corpus order, so a stable sort keeps equal cosines
    in corpus order.
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
