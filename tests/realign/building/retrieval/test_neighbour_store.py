"""Shards of neighbours are read as they were found; damaged ones and those of others are not."""

from __future__ import annotations

from collections import Counter
from pathlib import Path

import numpy as np
import pytest

from realign.building.retrieval.neighbour_store import NeighbourStore
from realign.building.retrieval.neighbours import Neighbours
from realign.errors import RefusedError

ORIGIN = {"rule": {"k": 2}, "index": "exact", "embeddings": "00ff"}
RANGES = [range(3), range(3, 5)]


def found(images: range) -> Neighbours:
    indices = np.array([[(image + 1) % 5, -1] for image in images])
    cosines = np.array([[0.5 + image / 100, np.nan] for image in images], np.float32)
    counts = Counter(near_duplicate=len(images)), Counter(no_more_images=images.start)
    return Neighbours(indices, cosines, *counts)


@pytest.fixture
def store(tmp_path: Path) -> NeighbourStore:
    store = NeighbourStore(tmp_path / "neighbours", ORIGIN, RANGES)
    assert store.missing() == [0, 1]
    for number, images in enumerate(RANGES):
        store.write(number, store.encode(images, found(images)))
    return store


def test_written_neighbours_are_read_back(store: NeighbourStore) -> None:
    assert store.missing() == []
    whole, expected = store.read(), found(range(5))
    assert np.array_equal(whole.indices, expected.indices)
    assert np.array_equal(whole.cosines, expected.cosines, equal_nan=True)
    assert whole.excluded == Counter(near_duplicate=5)
    assert whole.short == Counter(no_more_images=3)


@pytest.mark.parametrize(
    "other", [{"rule": {"k": 3}}, {"index": "ivf"}, {"embeddings": "00fe"}, {"more": 1}]
)
def test_neighbours_of_another_origin_are_refused(store: NeighbourStore, other) -> None:
    foreign = NeighbourStore(store.folder, ORIGIN | other, RANGES)
    assert foreign.missing() == [0, 1]
    with pytest.raises(RefusedError, match=r"00000\.safetensors .* Delete it and run again\."):
        foreign.read()


def test_neighbours_of_other_images_count_as_missing(store: NeighbourStore) -> None:
    assert NeighbourStore(store.folder, ORIGIN, [range(3), range(3, 6)]).missing() == [1]
    store.path(0).write_bytes(store.path(1).read_bytes())
    assert store.missing() == [0]


def test_every_damaged_byte_and_every_truncation_is_detected(store: NeighbourStore) -> None:
    path = store.path(1)
    whole = path.read_bytes()
    # a space of the header's padding is the one byte that means nothing
    header = 8 + int.from_bytes(whole[:8], "little")
    padding = range(whole.rindex(b"}", 0, header) + 1, header)
    for place in set(range(len(whole))) - {*padding}:
        path.write_bytes(whole[:place] + bytes([whole[place] ^ 1]) + whole[place + 1 :])
        assert store.missing() == [1], place
    for length in range(len(whole)):
        path.write_bytes(whole[:length])
        assert store.missing() == [1], length
    with pytest.raises(RefusedError, match=r"00001\.safetensors .* damaged .*Delete it and run"):
        store.read()
