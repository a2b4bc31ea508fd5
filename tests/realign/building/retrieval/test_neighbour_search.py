"""The images that are accepted for a query, on cases made by hand and against a loop."""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Sequence

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from realign.building.retrieval import neighbour_search
from realign.building.retrieval.exact import ExactIndex
from realign.building.retrieval.index import Index, make_index
from realign.building.retrieval.neighbour_search import NeighbourSearch
from realign.building.retrieval.neighbours import Neighbours, Rule
from realign.errors import RefusedError

NAMES = ["0", "1", "2", "3", "4", "5"]


def circle(*degrees: float) -> ExactIndex:
    """Images on a circle: the cosine of two is that of the angle between them."""
    angles = torch.tensor(degrees).deg2rad()
    return ExactIndex(torch.stack([angles.cos(), angles.sin()], dim=1))


def find_neighbours(
    index: Index,
    queries: Sequence[int] | np.ndarray,
    digests: Sequence[str],
    rule: Rule,
    hashes: np.ndarray | None = None,
) -> Neighbours:
    return NeighbourSearch(index, digests, rule, hashes).find(queries)


def images_of(found: Neighbours, query: int) -> list[int]:
    """Return the accepted images; the places behind them hold -1 and no cosine."""
    indices = found.indices[query]
    count = int((indices >= 0).sum())
    assert (indices[:count] >= 0).all()
    assert np.array_equal(np.isnan(found.cosines[query]), indices < 0)
    return indices[:count].tolist()


def accepted(found: Neighbours, query: int) -> list[tuple[int, int]]:
    """Images with their ranks, from 1."""
    return [(image, rank) for rank, image in enumerate(images_of(found, query), 1)]


def test_nearest_other_images_have_rank_and_cosine() -> None:
    found = find_neighbours(circle(0, 10, 30, 5, 90, 60), [0, 4], NAMES, Rule(k=3))
    assert accepted(found, 0) == [(3, 1), (1, 2), (2, 3)]
    assert accepted(found, 1) == [(5, 1), (2, 2), (1, 3)]
    assert found.cosines[0, 2] == pytest.approx(math.cos(math.radians(30)), abs=1e-6)
    assert not found.excluded
    assert not found.short


def test_byte_duplicates_are_skipped_and_counted() -> None:
    digests = ["a", "b", "a", "c", "a", "d"]
    found = find_neighbours(circle(0, 10, 0, 5, 0, 60), [0, 1], digests, Rule(k=2))
    assert accepted(found, 0) == [(3, 1), (1, 2)]
    assert accepted(found, 1) == [(3, 1), (0, 2)]  # equal pictures: the first of them
    assert found.excluded == {"byte_duplicate": 2}


def test_near_duplicates_are_excluded_by_hamming_distance() -> None:
    hashes = np.array([0, 0b111, 0b1111, 1 << 63, 2**64 - 1, 0b11111], np.uint64)
    index = circle(0, 1, 2, 3, 4, 5)
    found = find_neighbours(index, [0], NAMES, Rule(k=10, max_hamming=3), hashes)
    assert accepted(found, 0) == [(2, 1), (4, 2), (5, 3)]
    assert found.excluded == {"near_duplicate": 2}  # 1 and 3 differ in three bits and in one
    assert found.short == {"no_more_images": 1}
    exact = find_neighbours(index, [0], NAMES, Rule(k=10, max_hamming=0), hashes)
    assert len(images_of(exact, 0)) == 5


def test_the_band_of_cosines_is_inclusive() -> None:
    index = circle(0, 0, 60, 90, 120, 180)
    cosine = float(index.search(index.embeddings[:1], 3)[0][0, 2])
    rule = Rule(k=5, min_cosine=cosine, max_cosine=0.99)
    found = find_neighbours(index, [0], NAMES, rule)
    assert accepted(found, 0) == [(2, 1)]
    assert found.excluded == {"above_max_cosine": 1}
    assert found.short == {"below_min_cosine": 1}
    above = find_neighbours(index, [0], NAMES, Rule(k=5, max_cosine=cosine))
    assert accepted(above, 0) == [(2, 1), (3, 2), (4, 3), (5, 4)]


@pytest.mark.parametrize("high", [None, 1.0])
def test_a_duplicate_below_the_band_counts_as_below_min_cosine(
    high: float | None,
) -> None:
    rule = Rule(k=3, min_cosine=0.5, max_cosine=high)
    found = find_neighbours(circle(0, 10, 90), [0], ["a", "b", "a"], rule)
    assert accepted(found, 0) == [(1, 1)]
    assert found.excluded + found.short == {"below_min_cosine": 1}


def test_an_excluded_image_counts_under_its_strongest_reason_alone() -> None:
    hashes = np.zeros(4, np.uint64)
    rule = Rule(k=1, max_cosine=0.5, max_hamming=5)
    found = find_neighbours(circle(0, 0, 1, 2), [0], ["a", "a", "b", "c"], rule, hashes)
    assert images_of(found, 0) == []
    assert found.excluded == {"byte_duplicate": 1, "near_duplicate": 2}
    assert found.short == {"no_more_images": 1}


def test_images_beyond_the_last_accepted_one_are_not_counted() -> None:
    digests = ["a", "b", "a", "c"]
    found = find_neighbours(circle(0, 1, 50, 2), [0], digests, Rule(k=2))
    assert accepted(found, 0) == [(1, 1), (3, 2)]
    assert not found.excluded


def test_one_image_has_no_neighbour() -> None:
    found = find_neighbours(circle(0), [0], ["a"], Rule())
    assert images_of(found, 0) == []
    assert found.indices.tolist() == [[-1] * 10]
    assert found.short == {"no_more_images": 1}
    assert find_neighbours(circle(0), [], ["a"], Rule()).indices.shape == (0, 10)


def test_an_exhausted_candidate_list_searches_the_corpus_again() -> None:
    """The 400 nearest images are one picture, and the eleventh other image is beyond them."""
    depths = []

    class Asked(ExactIndex):
        def search(self, queries: Tensor, k: int) -> tuple[Tensor, Tensor]:
            depths.append((len(queries), k))
            return super().search(queries, k)

    index = Asked(circle(*[0] * 400, *range(10, 30)).embeddings)
    digests = ["same"] * 400 + [str(n) for n in range(20)]
    found = find_neighbours(index, [7, 415], digests, Rule(k=10))
    assert accepted(found, 0) == [(400 + n, n + 1) for n in range(10)]
    assert found.excluded["byte_duplicate"] == 399
    assert depths == [(2, 19)]


def loop(
    embeddings: Tensor, query: int, digests: list[str], rule: Rule, hashes: np.ndarray
) -> tuple[list[int], Counter[str]]:
    """The specification, an image at a time."""
    cosines = embeddings[query].double() @ embeddings.double().T
    low, high = (
        None if bound is None else np.float32(bound) for bound in (rule.min_cosine, rule.max_cosine)
    )
    accepted: list[int] = []
    counts: Counter[str] = Counter()
    is_below = False
    for other in cosines.argsort(descending=True, stable=True).tolist():
        cosine = np.float32(cosines[other].item())
        if len(accepted) == rule.k:
            break
        if low is not None and cosine < low:
            is_below = True
        elif other == query:
            continue
        elif digests[other] == digests[query]:
            counts["byte_duplicate"] += 1
        elif (
            rule.max_hamming is not None
            and int(hashes[other] ^ hashes[query]).bit_count() <= rule.max_hamming
        ):
            counts["near_duplicate"] += 1
        elif high is not None and cosine > high:
            counts["above_max_cosine"] += 1
        else:
            accepted.append(other)
    if len(accepted) < rule.k:
        counts["below_min_cosine" if is_below else "no_more_images"] += 1
    return accepted, counts


@pytest.mark.parametrize("name", ["exact", "flat"])
@pytest.mark.parametrize("block", [3, 4096])
@pytest.mark.parametrize("hamming", [None, 1])
@pytest.mark.parametrize(
    ("low", "high"), [(None, None), (0.1, 0.6), (0.5, 0.55), (None, -0.2), (0.3, None), (0.9, 1)]
)
def test_neighbour_search_equals_a_plain_loop(
    monkeypatch: pytest.MonkeyPatch,
    name: str,
    block: int,
    hamming: int | None,
    low: float | None,
    high: float | None,
) -> None:
    monkeypatch.setattr(neighbour_search, "BLOCK", block)
    monkeypatch.setattr(neighbour_search, "PLACES", 50 * block)
    generator = torch.Generator().manual_seed(0)
    embeddings = F.normalize(torch.randn(300, 6, generator=generator))
    embeddings[200:220] = embeddings[100:120]  # the same vector of different pictures
    random = np.random.default_rng(0)
    digests = [str(n) for n in random.integers(40, size=300)]
    hashes = random.integers(16, size=300, dtype=np.uint64)
    rule = Rule(k=8, min_cosine=low, max_cosine=high, max_hamming=hamming)
    queries = random.integers(300, size=20)
    found = find_neighbours(make_index(name, embeddings), queries, digests, rule, hashes)
    expected = [loop(embeddings, int(query), digests, rule, hashes) for query in queries]
    assert [images_of(found, i) for i in range(20)] == [images for images, _ in expected]
    assert found.excluded + found.short == sum((counts for _, counts in expected), Counter())


def test_an_excluded_band_needs_one_search(monkeypatch: pytest.MonkeyPatch) -> None:
    """Nine of ten images are too near, a thousand are the same picture: one search is enough."""
    asked: list[int] = []
    search = ExactIndex._search_block
    monkeypatch.setattr(
        ExactIndex,
        "_search_block",
        lambda self, queries, k, mask: asked.append(k) or search(self, queries, k, mask),
    )
    embeddings = F.normalize(torch.randn(5000, 8, generator=torch.Generator().manual_seed(0)))
    index, queries = ExactIndex(embeddings), range(1000)
    high = float((embeddings[:1000] @ embeddings.T).quantile(0.1))
    digests = [str(number) for number in range(5000)]
    hashes = np.full(5000, 2**64 - 1, np.uint64)
    hashes[:1000] = 0
    rule = Rule(k=10, max_cosine=high, max_hamming=3)
    found = find_neighbours(index, queries, digests, rule, hashes)
    assert set(asked) == {10}
    assert len(asked) <= 2  # blocks of queries
    assert found.excluded["above_max_cosine"] > 1000 * 3400
    assert found.excluded["near_duplicate"] > 1000 * 800
    assert (found.indices >= 1000).all()


def test_an_approximate_index_without_more_results_ends_the_search() -> None:
    class Short(ExactIndex):
        def search(self, queries: Tensor, k: int) -> tuple[Tensor, Tensor]:
            cosines, indices = super().search(queries, k)
            cosines[:, 3:], indices[:, 3:] = -torch.inf, -1
            return cosines, indices

    index = Short(circle(*range(100)).embeddings)
    found = find_neighbours(index, [0], [str(n) for n in range(100)], Rule(k=5, min_cosine=0.5))
    assert accepted(found, 0) == [(1, 1), (2, 2)]
    assert found.short == {"no_more_images": 1}


@pytest.mark.parametrize(
    ("rule", "message"),
    [
        ({"k": 0}, "k must be at least 1, got 0"),
        ({"max_hamming": 64}, "max_hamming must be 0 to 63, got 64"),
        ({"min_cosine": 2.0}, "min_cosine must be -1 to 1, got 2.0"),
        ({"min_cosine": 0.9, "max_cosine": 0.8}, "min_cosine must be at most max_cosine 0.8"),
    ],
)
def test_a_rule_that_no_image_can_meet_is_refused(rule: dict[str, float], message: str) -> None:
    with pytest.raises(RefusedError, match=message):
        Rule(**rule)


def test_digests_and_hashes_must_match_the_number_of_images() -> None:
    with pytest.raises(ValueError, match="digests must be one for each image, 2, got 1"):
        find_neighbours(circle(0, 1), [0], ["a"], Rule())
    with pytest.raises(ValueError, match=r"hashes must be uint64 of shape \(2,\) .* got none"):
        find_neighbours(circle(0, 1), [0], ["a", "b"], Rule(max_hamming=1))
    with pytest.raises(ValueError, match="got int64 of shape"):
        find_neighbours(circle(0, 1), [0], ["a", "b"], Rule(max_hamming=1), np.zeros(2, np.int64))
