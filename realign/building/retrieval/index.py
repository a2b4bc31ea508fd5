"""The protocol of indexes, and the choice of one by name."""

from __future__ import annotations

from typing import Protocol

from torch import Tensor

from realign.building.retrieval.exact import ExactIndex
from realign.building.retrieval.faiss_index import KINDS, FaissIndex
from realign.errors import RefusedError

INDEXES = ("exact", *KINDS)


class Index(Protocol):
    """Top-k search by cosine among ``embeddings``, rows of length 1.

    ``search`` returns cosines and row numbers, shape ``(queries, min(k, images))``, the best first
    and equal cosines in corpus order. An approximate index that finds fewer fills the rest with
    ``-inf`` and -1.
    """

    name: str
    embeddings: Tensor

    def __len__(self) -> int: ...

    def search(self, queries: Tensor, k: int) -> tuple[Tensor, Tensor]: ...


def make_index(name: str, embeddings: Tensor) -> Index:
    """Return the index with a name over ``embeddings``.

    Args:
        name: ``exact``, or ``flat``, ``ivf`` or ``hnsw`` of FAISS. Exact search takes time
            proportional to queries times images; the last two pay off when both are a million.
        embeddings: Rows of shape ``(images, D)``, float32 or float16, on the CPU.
    Raises:
        RefusedError: The name is unknown, or FAISS is not installed.
    """
    if name not in INDEXES:
        raise RefusedError(f"index must be one of {', '.join(INDEXES)}, got {name!r}. Choose one.")
    return ExactIndex(embeddings) if name == "exact" else FaissIndex(embeddings, name)
