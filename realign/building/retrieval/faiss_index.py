"""Search with FAISS: flat (exact), and IVF and HNSW, which search a part of a large corpus.

The images that FAISS finds are scored again as in :mod:`realign.building.retrieval.exact`, so
cosines and their order do not depend on the index or its threads. An index is built by one thread
with a fixed seed, so that the same corpus gives the same index.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor

from realign.building.retrieval.exact import pair_cosines
from realign.errors import RefusedError

KINDS = ("flat", "ivf", "hnsw")
SEED = 1234  # seed of the k-means of IVF and of the layers of HNSW
# with fewer rows per list, k-means warns
ROWS_PER_LIST = 39
# number of images beyond k that are found per query, because float32 may misorder them
SPARE = 16
# number of queries or rows that are passed to FAISS at once
BLOCK = 4096


class FaissIndex:
    """FAISS index with the protocol :class:`realign.building.retrieval.index.Index`.

    It holds a float32 copy of the vectors (HNSW also ``2 * links`` numbers per row). Of equal
    cosines at the last place, those that FAISS meets first are found.

    Args:
        embeddings: Rows of length 1, shape ``(images, D)``, float32 or float16, on the CPU.
        kind: ``flat``, ``ivf`` or ``hnsw``.
        lists: Number of IVF's lists; ``4 sqrt(images)`` by default.
        probes: Number of lists that a query searches; by default a sixteenth, at least 8.
        links: Number of neighbours of a row in HNSW's graph.
        effort: Number of candidates that HNSW keeps; it uses at least twice the requested k.
        threads: Number of threads of a search; by default FAISS's own choice.
    Raises:
        RefusedError: FAISS is not installed, or ``kind`` is unknown.
    """

    def __init__(
        self,
        embeddings: Tensor,
        kind: str,
        *,
        lists: int | None = None,
        probes: int | None = None,
        links: int = 32,
        effort: int = 128,
        threads: int | None = None,
    ) -> None:
        if kind not in KINDS:
            raise RefusedError(f"kind must be one of {', '.join(KINDS)}, got {kind!r}. Choose one.")
        self.faiss = _load_faiss(kind)
        self.name = f"faiss-{kind}"
        self.kind = kind
        self.embeddings = embeddings
        self.effort = effort
        self.threads = threads
        with self._threads(1):
            self.index = self._make(lists, probes, links)
            for start in range(0, len(embeddings), BLOCK):
                self.index.add(embeddings[start : start + BLOCK].float().numpy())

    def __len__(self) -> int:
        return len(self.embeddings)

    def search(self, queries: Tensor, k: int) -> tuple[Tensor, Tensor]:
        """Return the ``k`` largest cosines that FAISS finds for each query, best first.

        Returns:
            cosines, indices: Shape ``(queries, min(k, images))``, float32 and int64. Where IVF or
            HNSW finds fewer than ``k`` the rest is ``-inf`` and -1.
        """
        k = min(k, len(self))
        cosines = torch.empty(len(queries), k)
        indices = torch.empty(len(queries), k, dtype=torch.int64)
        with self._threads(self.threads):
            for start in range(0, len(queries) if k else 0, BLOCK):
                block = slice(start, start + BLOCK)
                cosines[block], indices[block] = self._search_block(queries[block], k)
        return cosines, indices

    def _search_block(self, queries: Tensor, k: int) -> tuple[Tensor, Tensor]:
        wanted = min(k + SPARE, len(self))
        if self.kind == "hnsw":
            self.index.hnsw.efSearch = max(self.effort, 2 * wanted)
        found = torch.from_numpy(self.index.search(queries.float().numpy(), wanted)[1])
        indices = found.sort(dim=1).values  # equal cosines in corpus order
        rows, places = (indices >= 0).nonzero(as_tuple=True)
        exact = torch.full(indices.shape, -torch.inf, dtype=torch.float64)
        exact[rows, places] = pair_cosines(queries, self.embeddings, rows, indices[rows, places])
        best = exact.sort(dim=1, descending=True, stable=True)
        return best.values[:, :k].float(), indices.gather(1, best.indices[:, :k])

    def _make(self, lists: int | None, probes: int | None, links: int) -> Any:
        images, size = self.embeddings.shape
        if self.kind == "flat":
            return self.faiss.IndexFlatIP(size)
        if self.kind == "hnsw":
            index = self.faiss.IndexHNSWFlat(size, links, self.faiss.METRIC_INNER_PRODUCT)
            index.hnsw.efConstruction = 4 * links
            index.hnsw.rng = self.faiss.RandomGenerator(SEED)
            return index
        lists = max(1, min(lists or int(4 * images**0.5), images // ROWS_PER_LIST))
        coarse = self.faiss.IndexFlatIP(size)
        index = self.faiss.IndexIVFFlat(coarse, size, lists, self.faiss.METRIC_INNER_PRODUCT)
        index.nprobe = min(lists, probes or max(8, lists // 16))
        index.cp.seed = SEED
        sample = torch.linspace(0, images - 1, min(images, lists * 4 * ROWS_PER_LIST)).long()
        index.train(self.embeddings[sample].float().numpy())
        return index

    @contextmanager
    def _threads(self, number: int | None) -> Iterator[None]:
        before = self.faiss.omp_get_max_threads()
        self.faiss.omp_set_num_threads(number or before)
        try:
            yield
        finally:
            self.faiss.omp_set_num_threads(before)


def _load_faiss(kind: str) -> Any:
    try:
        import faiss
    except ImportError:
        raise RefusedError(
            f"index {kind!r} requires FAISS, which is not installed. Install "
            "'realign[pipeline,retrieval]' or use exact."
        ) from None
    return faiss
