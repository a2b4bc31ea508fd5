"""Shards of embeddings are kept for a resumed run; damaged ones and those of others are not."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file

from realign.building.retrieval.embedding_store import EmbeddingStore
from realign.errors import RefusedError

IDENTITY = {"model": {"a.safetensors": "00ff"}, "dtype": "torch.float32"}
SHARDS = [["a", "b", "c"], ["d", "e", "f"], ["g"]]


def vectors(shard: int) -> torch.Tensor:
    generator = torch.Generator().manual_seed(shard)
    return torch.randn(len(SHARDS[shard]), 8, generator=generator)


@pytest.fixture
def store(tmp_path: Path) -> EmbeddingStore:
    """All shards written."""
    store = EmbeddingStore(tmp_path, IDENTITY)
    for number, digests in enumerate(SHARDS):
        store.write(number, vectors(number), digests)
    return store


def test_written_embeddings_are_read_back(store: EmbeddingStore) -> None:
    assert store.missing(SHARDS) == []
    expected = torch.cat([vectors(number) for number in range(3)])
    assert store.read(SHARDS).dtype == torch.float32
    assert torch.equal(store.read(SHARDS), expected)
    half = EmbeddingStore(store.folder / "half", IDENTITY, torch.float16)
    for number, digests in enumerate(SHARDS):
        half.write(number, vectors(number), digests)
    assert torch.equal(half.read(SHARDS), expected.half())


def test_the_content_hash_depends_on_every_vector(store: EmbeddingStore) -> None:
    before = store.content(SHARDS)
    store.write(1, vectors(1), SHARDS[1])
    assert store.content(SHARDS) == before
    changed = vectors(1)
    changed[0, 0] += 1e-6
    store.write(1, changed, SHARDS[1])
    assert store.content(SHARDS) not in (before, store.content(SHARDS[:2]))
    store.path(2).write_bytes(b"")
    with pytest.raises(RefusedError, match=r"00002\.safetensors .*Delete it and run again"):
        store.content(SHARDS)


def test_equal_vectors_give_equal_bytes(store: EmbeddingStore, tmp_path: Path) -> None:
    again = EmbeddingStore(tmp_path / "again", dict(reversed(IDENTITY.items())))
    again.write(1, vectors(1), SHARDS[1])
    assert again.path(1).read_bytes() == store.path(1).read_bytes()


def test_only_absent_shards_are_missing(store: EmbeddingStore) -> None:
    store.path(1).unlink()
    assert store.missing(SHARDS) == [1]
    with pytest.raises(RefusedError, match=r"00001\.safetensors .* does not exist\. Embed it"):
        store.read(SHARDS)
    store.write(1, vectors(1), SHARDS[1])
    assert store.missing(SHARDS) == []
    assert EmbeddingStore(store.folder / "new", IDENTITY).missing(SHARDS) == [0, 1, 2]


@pytest.mark.parametrize(
    "other", [{"dtype": "torch.bfloat16"}, {"model": {"a.safetensors": "00fe"}}]
)
def test_vectors_of_another_encoder_are_refused(
    store: EmbeddingStore, other: dict[str, object]
) -> None:
    foreign = EmbeddingStore(store.folder, IDENTITY | other)
    assert foreign.missing(SHARDS) == [0, 1, 2]
    with pytest.raises(RefusedError, match="another encoder"):
        foreign.read(SHARDS)


def test_vectors_of_another_dtype_count_as_missing(store: EmbeddingStore) -> None:
    assert EmbeddingStore(store.folder, IDENTITY, torch.float16).missing(SHARDS) == [0, 1, 2]


@pytest.mark.parametrize(
    "digests", [["d", "e", "x"], ["e", "d", "f"], ["d", "e"], ["d", "ef"], ["de", "f"]]
)
def test_vectors_of_other_images_are_refused(store: EmbeddingStore, digests: list[str]) -> None:
    changed = [SHARDS[0], digests, SHARDS[2]]
    assert store.missing(changed) == [1]
    with pytest.raises(RefusedError, match="other images"):
        store.read(changed)


def test_every_damaged_byte_and_every_truncation_is_detected(store: EmbeddingStore) -> None:
    path = store.path(1)
    whole = path.read_bytes()
    # a space of the header's padding is the one byte that means nothing
    header = 8 + int.from_bytes(whole[:8], "little")
    padding = range(whole.rindex(b"}", 0, header) + 1, header)
    for place in set(range(len(whole))) - {*padding}:
        path.write_bytes(whole[:place] + bytes([whole[place] ^ 1]) + whole[place + 1 :])
        assert store.missing(SHARDS) == [1], place
    for length in range(len(whole)):
        path.write_bytes(whole[:length])
        assert store.missing(SHARDS) == [1], length
    with pytest.raises(RefusedError, match="damaged"):
        store.read(SHARDS)


def test_shards_of_an_older_schema_are_refused_and_count_as_missing(store: EmbeddingStore) -> None:
    save_file({"embeddings": vectors(1)}, store.path(1), {"embeddings": "{}"})
    assert store.missing(SHARDS) == [1]
    with pytest.raises(RefusedError, match="it is of schema 1, this version reads 2"):
        store.read(SHARDS)


def test_a_failed_write_leaves_the_shard_as_it_was(
    store: EmbeddingStore, monkeypatch: pytest.MonkeyPatch
) -> None:
    def full_disk(*_: object, **__: object) -> None:
        raise OSError("no space left")

    monkeypatch.setattr("realign.building.retrieval.embedding_store.encode_arrays", full_disk)
    with pytest.raises(OSError, match="no space"):
        store.write(1, vectors(1) + 1, SHARDS[1])
    assert store.missing(SHARDS) == []
    assert sorted(path.name for path in store.folder.iterdir()) == [
        f"0000{number}.safetensors" for number in range(3)
    ]


def test_vectors_must_fit_their_images(store: EmbeddingStore) -> None:
    with pytest.raises(ValueError, match=r"one row for each of 3 images, got \(2, 8\)"):
        store.write(0, vectors(0)[:2], SHARDS[0])
    with pytest.raises(ValueError, match="finite, shard 0"):
        store.write(0, vectors(0) / 0, SHARDS[0])
