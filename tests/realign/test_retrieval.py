"""Exact cosine search."""

from __future__ import annotations

import torch
import torch.nn.functional as F

from realign.build import retrieval
from realign.build.retrieval import nearest


def test_self_is_excluded_and_order_is_by_cosine() -> None:
    angles = torch.tensor([0.0, 0.1, 0.3, 2.0])
    embeddings = torch.stack([angles.cos(), angles.sin()], dim=1)
    cosines, indices = nearest(embeddings, [0, 3], k=10)
    assert indices.tolist() == [[1, 2, 3], [2, 1, 0]]
    torch.testing.assert_close(cosines[0], (angles[[1, 2, 3]] - angles[0]).cos())


def test_equal_cosines_come_in_corpus_order() -> None:
    embeddings = F.normalize(torch.ones(6, 3), dim=1)
    _, indices = nearest(embeddings, [2], k=3)
    assert indices.tolist() == [[0, 1, 3]]


def test_chunks_do_not_change_the_answer(monkeypatch) -> None:
    embeddings = F.normalize(torch.randn(50, 8, generator=torch.Generator().manual_seed(0)), dim=1)
    whole = nearest(embeddings, range(50), k=5)
    monkeypatch.setattr(retrieval, "SEARCH_ROWS", 7)
    parts = nearest(embeddings, range(50), k=5)
    assert torch.equal(whole[1], parts[1])
    torch.testing.assert_close(whole[0], parts[0])
