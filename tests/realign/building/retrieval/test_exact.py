"""Exact search against all cosines in float64."""

from __future__ import annotations

import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from realign.building.retrieval import exact
from realign.building.retrieval.exact import ExactIndex


@pytest.fixture(autouse=True)
def _one_thread() -> Iterator[None]:
    """Small products wait for their threads longer than they compute."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


def unit(rows: int, size: int, seed: int = 0) -> Tensor:
    return F.normalize(torch.randn(rows, size, generator=torch.Generator().manual_seed(seed)))


def whole(embeddings: Tensor, queries: Tensor, k: int) -> tuple[Tensor, Tensor]:
    """The specification: every cosine, sorted, equal ones in corpus order."""
    best = (queries.double() @ embeddings.double().T).sort(dim=1, descending=True, stable=True)
    return best.values[:, :k].float(), best.indices[:, :k]


@pytest.mark.parametrize("images", [1, 7, 8, 9, 19, 64])
@pytest.mark.parametrize("queries", [1, 4, 5, 11])
@pytest.mark.parametrize("k", [1, 3, 10, 100])
def test_exact_search_equals_the_full_matrix_for_any_block_boundary(
    images: int, queries: int, k: int
) -> None:
    embeddings, asked = unit(images, 6), unit(queries, 6, seed=1)
    index = ExactIndex(embeddings, query_rows=5, corpus_rows=8)
    cosines, indices = index.search(asked, k)
    expected = whole(embeddings, asked, k)
    assert torch.equal(indices, expected[1])
    torch.testing.assert_close(cosines, expected[0], rtol=0, atol=1e-7)
    assert indices.shape == (queries, min(k, images))


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16])
@pytest.mark.parametrize("size", [1, 3, 512])
def test_exact_search_equals_the_full_matrix_for_every_size_and_dtype(
    dtype: torch.dtype, size: int
) -> None:
    embeddings = unit(500, size).to(dtype)
    cosines, indices = ExactIndex(embeddings, corpus_rows=64).search(embeddings[:20], 10)
    expected = whole(embeddings, embeddings[:20], 10)
    assert torch.equal(indices, expected[1])
    torch.testing.assert_close(cosines, expected[0], rtol=0, atol=1e-7)


@pytest.mark.parametrize("corpus_rows", [1, 7, 64, 1000])
@pytest.mark.parametrize("query_rows", [1, 3, 100])
def test_equal_cosines_come_in_corpus_order(corpus_rows: int, query_rows: int) -> None:
    """A product of different tiles may round equal rows differently; the answer must not."""
    embeddings = unit(5, 33)[torch.arange(300) % 5]
    index = ExactIndex(embeddings, query_rows=query_rows, corpus_rows=corpus_rows)
    _, indices = index.search(embeddings[:5], 70)
    order = (embeddings[:5].double() @ embeddings[:5].double().T).argsort(1, descending=True)
    expected = torch.stack(
        [torch.cat([torch.arange(60) * 5 + n for n in row])[:70] for row in order.tolist()]
    )
    assert torch.equal(indices, expected)


def test_cosines_are_bitwise_equal_for_any_block_and_thread_count() -> None:
    embeddings, queries = unit(3000, 96), unit(40, 96, seed=1)
    first = ExactIndex(embeddings).search(queries, 10)
    for number, query_rows, corpus_rows in ((1, 40, 3000), (2, 7, 500), (2, 13, 77)):
        torch.set_num_threads(number)
        index = ExactIndex(embeddings, query_rows=query_rows, corpus_rows=corpus_rows)
        other = index.search(queries, 10)
        assert torch.equal(first[0], other[0])
        assert torch.equal(first[1], other[1])


def test_rows_that_differ_below_float32_are_ordered_correctly() -> None:
    """A thousand rows differ by 1e-7, and the rounding of the product does not order them."""
    generator = torch.Generator().manual_seed(0)
    center = unit(1, 256)
    embeddings = center + 1e-7 * torch.randn(1000, 256, generator=generator)
    cosines, indices = ExactIndex(embeddings, corpus_rows=100).search(center, 10)
    assert torch.equal(indices, whole(embeddings, center, 10)[1])
    assert (cosines.diff() <= 0).all()


@contextmanager
def product_precision(name: str) -> Iterator[None]:
    """Set the precision of float32 products for a while."""
    torch.set_float32_matmul_precision(name)
    try:
        yield
    finally:
        torch.set_float32_matmul_precision("highest")


def test_lower_precision_products_give_the_same_neighbours(monkeypatch: pytest.MonkeyPatch) -> None:
    """A trainer may have allowed bfloat16 inside float32 products."""
    embeddings, queries = unit(2000, 512), unit(20, 512, seed=1)
    expected = ExactIndex(embeddings).search(queries, 10)
    with product_precision("medium"):
        assert exact.product_error(512) > 2**-8
        coarse = ExactIndex(embeddings).search(queries, 10)
    assert torch.equal(expected[1], coarse[1])
    # whatever this processor does with "medium": a product that is off by what bfloat16 is off
    rounded = exact._Product.__call__
    monkeypatch.setattr(exact, "product_error", lambda size: 2**-7)
    monkeypatch.setattr(
        exact._Product,
        "__call__",
        lambda self, tile: rounded(self, tile.bfloat16().float()),
    )
    coarse = ExactIndex(embeddings).search(queries, 10)
    assert torch.equal(expected[0], coarse[0])
    assert torch.equal(expected[1], coarse[1])


def test_search_with_and_without_onednn_gives_equal_results(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    embeddings, queries = unit(500, 32), unit(20, 32, seed=1)
    monkeypatch.setattr(exact, "ONEDNN", 0)
    expected = ExactIndex(embeddings).search(queries, 10)
    monkeypatch.setattr(torch.backends.mkldnn, "is_available", lambda: False)
    other = ExactIndex(embeddings).search(queries, 10)
    assert torch.equal(expected[1], whole(embeddings, queries, 10)[1])
    assert torch.equal(expected[0], other[0])
    assert torch.equal(expected[1], other[1])


@pytest.mark.parametrize("precision", ["highest", "medium"])
@pytest.mark.parametrize("images", [1, 30, 700])
@pytest.mark.parametrize("most", [None, 2.0, 0.3, 0.0, -2.0])
def test_skipped_images_and_images_above_the_bound_are_not_returned(
    images: int, most: float | None, precision: str
) -> None:
    """Results equal those of a search among the remaining images, bit by bit."""
    embeddings, asked = unit(images, 24), unit(11, 24, seed=1)
    embeddings[images // 2 :] = embeddings[: images - images // 2].clone()
    generator = torch.Generator().manual_seed(2)
    rows, skipped = (torch.rand(11, images, generator=generator) < 0.1).nonzero(as_tuple=True)
    cosines = exact.pair_cosines(
        asked,
        embeddings,
        torch.arange(11).repeat_interleave(images),
        torch.arange(images).repeat(11),
    ).reshape(11, images)
    products = cosines[rows, skipped]
    cosines[rows, skipped] = -torch.inf
    if most == 0.3:  # a bound that some cosines are equal to
        most = float(cosines.float().flatten().sort().values[-max(1, len(cosines) // 3)])
    is_above = cosines.float() > (torch.inf if most is None else torch.tensor(most))
    expected = cosines.masked_fill(is_above, -torch.inf).sort(dim=1, descending=True, stable=True)
    order = expected.indices.masked_fill(expected.values == -torch.inf, -1)
    index = ExactIndex(embeddings, query_rows=4, corpus_rows=64)
    with product_precision(precision):
        found = index.search_others(asked, 20, rows, skipped, most)
        error = exact.product_error(24)
    assert torch.equal(found.cosines, expected.values[:, :20].float())
    assert torch.equal(found.indices, order[:, :20])
    assert torch.equal(found.above, is_above.sum(1))
    assert ((found.skipped - products).abs() <= error).all()


def test_empty_queries_and_an_empty_corpus_give_empty_results() -> None:
    cosines, indices = ExactIndex(unit(5, 4)).search(torch.empty(0, 4), 3)
    assert cosines.shape == indices.shape == (0, 3)
    assert ExactIndex(torch.empty(0, 4)).search(unit(2, 4), 3)[1].shape == (2, 0)


MEMORY = """
import torch
from realign.building.retrieval.exact import ExactIndex

torch.set_num_threads(1)

def high_water():
    with open("/proc/self/status") as file:
        return next(int(line.split()[1]) * 1024 for line in file if line.startswith("VmHWM"))

embeddings = torch.empty({images}, {size}).normal_()
for part in embeddings.split(4096):
    part.div_(part.norm(dim=1, keepdim=True))
ExactIndex(embeddings[:4096]).search(embeddings[:1024], 10)  # libraries' own buffers
before = high_water()
ExactIndex(embeddings).search(embeddings[:{queries}], {k})
print(high_water() - before)
"""


@pytest.mark.skipif(sys.platform != "linux", reason="reads /proc")
@pytest.mark.parametrize(
    ("queries", "k"), [(1024, 10), pytest.param(2, 200_000, marks=pytest.mark.full)]
)
def test_memory_does_not_grow_with_queries_times_images(queries: int, k: int) -> None:
    """1024 x 200,000 cosines would be 0.8 GB."""
    code = MEMORY.format(images=200_000, size=64, queries=queries, k=k)
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert int(done.stdout) < 64_000_000
