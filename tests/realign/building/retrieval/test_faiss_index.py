"""FAISS behind the same protocol: flat equals exact, IVF and HNSW nearly, and all repeat."""

from __future__ import annotations

import sys

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from realign.building.retrieval.exact import ExactIndex
from realign.building.retrieval.faiss_index import KINDS, FaissIndex
from realign.building.retrieval.index import INDEXES, make_index
from realign.errors import RefusedError


@pytest.fixture(scope="module")
def corpus() -> Tensor:
    """Return soft clusters on a curved surface of 16 dimensions, like embeddings of images."""
    generator = torch.Generator().manual_seed(0)
    centers = torch.randn(50, 16, generator=generator)
    points = centers[torch.randint(50, (5000,), generator=generator)]
    points = points + torch.randn(5000, 16, generator=generator)
    surface = (points @ torch.randn(16, 64, generator=generator) / 4).tanh()
    return F.normalize(surface + 0.1 * torch.randn(5000, 64, generator=generator))


def recall(found: Tensor, expected: Tensor) -> float:
    hits = (found[:, :, None] == expected[:, None, :]).any(2)
    return hits.float().mean().item()


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16])
def test_the_flat_index_equals_the_exact_index(corpus: Tensor, dtype: torch.dtype) -> None:
    corpus = corpus.to(dtype)
    flat = FaissIndex(corpus, "flat").search(corpus[:300], 10)
    exact = ExactIndex(corpus).search(corpus[:300], 10)
    assert torch.equal(flat[0], exact[0])
    assert torch.equal(flat[1], exact[1])


def test_the_flat_index_orders_equal_cosines_by_corpus_position(corpus: Tensor) -> None:
    twice = torch.cat([corpus[:100], corpus[:100]])
    _, indices = FaissIndex(twice, "flat").search(twice[:50], 2)
    assert torch.equal(indices, torch.stack([torch.arange(50), torch.arange(50) + 100], 1))


@pytest.mark.parametrize(("kind", "least"), [("ivf", 0.9), ("hnsw", 0.99)])
def test_approximate_indexes_reach_their_recall(corpus: Tensor, kind: str, least: float) -> None:
    cosines, indices = FaissIndex(corpus, kind).search(corpus[:500], 10)
    expected = ExactIndex(corpus).search(corpus[:500], 10)
    assert recall(indices, expected[1]) > least
    assert (cosines.diff(dim=1) <= 0).all()
    # cosines are computed from the rows, not taken from FAISS
    again = (corpus[:500, None].double() * corpus[indices].double()).sum(2)
    torch.testing.assert_close(cosines, again.float(), rtol=0, atol=1e-7)


@pytest.mark.parametrize("kind", KINDS)
def test_results_do_not_depend_on_the_number_of_threads(corpus: Tensor, kind: str) -> None:
    import faiss

    threads = faiss.omp_get_max_threads()
    answers = []
    for number in (1, 2):
        faiss.omp_set_num_threads(number)
        answers.append(FaissIndex(corpus, kind, threads=number).search(corpus[:200], 10))
        assert faiss.omp_get_max_threads() == number
    faiss.omp_set_num_threads(threads)
    assert torch.equal(answers[0][0], answers[1][0])
    assert torch.equal(answers[0][1], answers[1][1])


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("images", [1, 3, 40])
def test_small_corpora_are_searched_exactly(corpus: Tensor, kind: str, images: int) -> None:
    cosines, indices = FaissIndex(corpus[:images], kind).search(corpus[:2], 10)
    expected = ExactIndex(corpus[:images]).search(corpus[:2], 10)
    assert torch.equal(indices, expected[1])
    assert torch.equal(cosines, expected[0])


def test_ivf_pads_missing_neighbours_with_minus_one(corpus: Tensor) -> None:
    cosines, indices = FaissIndex(corpus, "ivf", lists=100, probes=1).search(corpus[:20], 2000)
    assert (indices[:, 0] == torch.arange(20)).all()
    assert (indices[:, -1] == -1).all()
    assert torch.equal(cosines == -torch.inf, indices == -1)


@pytest.mark.parametrize("name", INDEXES)
def test_every_name_makes_an_index(corpus: Tensor, name: str) -> None:
    index = make_index(name, corpus[:100])
    assert len(index) == 100
    assert index.name == ("exact" if name == "exact" else f"faiss-{name}")
    assert index.search(corpus[:3], 1)[1].tolist() == [[0], [1], [2]]


def test_unknown_names_are_refused(corpus: Tensor) -> None:
    with pytest.raises(RefusedError, match=r"index must be one of exact, flat.*got 'annoy'"):
        make_index("annoy", corpus)
    with pytest.raises(RefusedError, match=r"kind must be one of flat, ivf, hnsw, got 'exact'"):
        FaissIndex(corpus, "exact")


def test_a_missing_faiss_is_refused_with_the_extra_to_install(corpus: Tensor, monkeypatch) -> None:
    monkeypatch.setitem(sys.modules, "faiss", None)
    with pytest.raises(RefusedError, match=r"Install 'realign\[pipeline,retrieval\]' or use exact"):
        make_index("ivf", corpus)
    assert len(make_index("exact", corpus)) == 5000
