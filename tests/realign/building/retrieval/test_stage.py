"""Retrieval as stages of a build: which results are kept, and when they are computed again."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from random import Random

import pytest
import torch
from PIL import Image

from realign.building.corpus import Corpus, inspect_corpus
from realign.building.retrieval import neighbour_search
from realign.building.retrieval import stage as neighbourhood
from realign.building.retrieval.embedding_store import EmbeddingStore
from realign.building.retrieval.encoders import ClipEncoder, embed_shard
from realign.building.retrieval.stage import EncoderModel, Neighbourhood, find_neighbourhood
from realign.config import BuildConfig
from realign.data.formats.source_row import SourceRow
from realign.errors import RefusedError
from realign.modeling.processors import load_processor

NUM_IMAGES = 12


@pytest.fixture
def corpus(tmp_path: Path) -> Corpus:
    random = Random(0)
    rows = []
    for number in range(NUM_IMAGES):
        path = tmp_path / f"{number}.png"
        Image.frombytes("RGB", (8, 8), random.randbytes(192)).save(path)
        rows.append(SourceRow(str(number), path.name, path, (), "a", "b", {}))
    return inspect_corpus(rows, tmp_path / "seen.jsonl", 1)[0]


@pytest.fixture
def config(tmp_path: Path, model_dir: Path) -> BuildConfig:
    return BuildConfig(
        source=tmp_path / "s.jsonl", model=str(model_dir), out=tmp_path / "out", top_k=3
    )


def retrieve(config: BuildConfig, corpus: Corpus, seed: int = 0) -> Neighbourhood:
    """Neighbours by random vectors, in two shards of embeddings."""
    digests = [corpus.digests[:7], corpus.digests[7:]]
    store = EmbeddingStore(config.out / "embeddings", {"seed": seed})
    vectors = torch.randn(len(corpus), 4, generator=torch.Generator().manual_seed(seed))
    vectors = torch.nn.functional.normalize(vectors)
    for number, part in enumerate(vectors.split(7)):
        store.write(number, part, digests[number])
    return find_neighbourhood(config, corpus, store, digests)


def test_stale_or_damaged_neighbours_are_computed_again(
    config: BuildConfig, corpus: Corpus, tmp_path: Path
) -> None:
    """The result equals that of an empty folder, whatever files the folder holds."""
    other = config.model_copy(update={"out": tmp_path / "other"})
    first = retrieve(config, corpus)
    path = config.out / "neighbours" / "00000.safetensors"
    raw, made = path.read_bytes(), path.stat().st_mtime_ns
    retrieve(config, corpus)
    assert path.stat().st_mtime_ns == made  # what is there is kept
    for content in (raw[:50], b"", raw[:-1] + b"\xff"):
        path.write_bytes(content)
        assert retrieve(config, corpus).found.indices.tolist() == first.found.indices.tolist()
        assert path.read_bytes() == raw
    second = retrieve(config, corpus, seed=1)
    assert second.found.indices.tolist() != first.found.indices.tolist()
    assert second.found.indices.tolist() == retrieve(other, corpus, 1).found.indices.tolist()
    fewer = retrieve(config.model_copy(update={"top_k": 2}), corpus, seed=1)
    assert fewer.found.indices.tolist() == second.found.indices[:, :2].tolist()


def test_digests_are_numbered_once_for_all_shards(
    config: BuildConfig, corpus: Corpus, monkeypatch: pytest.MonkeyPatch
) -> None:
    whole = retrieve(config, corpus)
    shutil.rmtree(config.out)
    calls: list[int] = []
    numbered = neighbour_search._numbered
    monkeypatch.setattr(neighbour_search, "_numbered", lambda d: calls.append(1) or numbered(d))
    monkeypatch.setattr(neighbourhood, "SEARCHED", 5)
    found = retrieve(config.model_copy(update={"shard_size": 5}), corpus)
    assert len([*(config.out / "neighbours").iterdir()]) == 3
    assert calls == [1]
    assert found.found.indices.tolist() == whole.found.indices.tolist()
    assert found.excluded == whole.excluded


def test_candidates_are_ranked_and_end_with_the_corpus(config: BuildConfig, corpus: Corpus) -> None:
    all_others = config.model_copy(update={"top_k": 20, "max_hamming": None})
    found = retrieve(all_others, corpus)
    candidates = found.candidates(corpus.paths[4])
    assert [candidate.rank for candidate in candidates] == [*range(1, NUM_IMAGES)]
    assert {c.name for c in candidates} == {f"{n}.png" for n in range(NUM_IMAGES)} - {"4.png"}
    assert found.excluded == {"no_more_images": NUM_IMAGES}


def test_the_identity_of_an_encoder_needs_no_weights(
    config: BuildConfig, tmp_path: Path, model_dir: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder = Path(shutil.copytree(model_dir, tmp_path / "vlm"))
    config = config.model_copy(update={"model": str(folder)})
    monkeypatch.setattr(neighbourhood, "load_model", None)
    monkeypatch.setattr(ClipEncoder, "load", None)
    own = EncoderModel.of(config).identity
    assert own["pooling"] == "mean over image tokens"
    assert own["processor"] == type(load_processor(folder).image_processor).__name__
    as_clip = EncoderModel.of(config.model_copy(update={"encoder": str(folder)})).identity
    assert as_clip["pooling"] == "the model's own"
    assert json.loads(json.dumps(own)) == own
    raw = bytearray((folder / "model.safetensors").read_bytes())
    raw[-1] ^= 1
    (folder / "model.safetensors").write_bytes(raw)
    assert EncoderModel.of(config).identity["model"] != own["model"]
    half = config.model_copy(update={"dtype": "bfloat16"})
    assert EncoderModel.of(half).identity["dtype"] == "torch.bfloat16"


def test_an_adapter_without_its_base_is_refused_as_encoder(
    config: BuildConfig, tmp_path: Path
) -> None:
    (tmp_path / "clip").mkdir()
    (tmp_path / "clip/adapter_config.json").write_text('{"base_model_name_or_path": "clip"}')
    with pytest.raises(RefusedError, match=r"encoder must be a whole model, got .*clip, an adap"):
        EncoderModel.of(config.model_copy(update={"encoder": str(tmp_path / "clip")}))


def test_a_worker_hashes_no_weights(
    config: BuildConfig, corpus: Corpus, monkeypatch: pytest.MonkeyPatch
) -> None:
    def hashed(folder: Path) -> dict[str, str]:
        raise AssertionError(folder)

    monkeypatch.setattr(neighbourhood, "model_identity", hashed)
    encoder = EncoderModel.of(config).open()
    assert embed_shard(encoder, corpus.paths[:2], 2).shape[0] == 2
