"""The similarity by an encoder in a folder, and the encoder that a name means."""

from __future__ import annotations

import json
import shutil
import sys
from pathlib import Path

import pytest
import torch
from transformers import AutoModel, AutoTokenizer, BertConfig, BertModel, BertTokenizer

from realign.building.similarity import load_similarity, similarity_identity
from realign.errors import RefusedError


def test_a_named_model_without_the_package_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "sentence_transformers", None)
    with pytest.raises(RefusedError, match="requires sentence-transformers"):
        load_similarity("sentence-transformers/all-mpnet-base-v2")


def random_encoder(folder: Path) -> Path:
    """A sentence-transformers folder as the real ones are: BERT, mean over tokens, length 1."""
    from sentence_transformers import SentenceTransformer
    from sentence_transformers.sentence_transformer.modules import Normalize, Pooling, Transformer

    bert = folder.with_name("bert")
    bert.mkdir()
    letters = "abcdefghijklmnopqrstuvwxyz"
    special = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]"]
    vocabulary = [*special, *letters, *(f"##{letter}" for letter in letters)]
    (bert / "vocab.txt").write_text("\n".join(vocabulary))
    BertTokenizer(str(bert / "vocab.txt")).save_pretrained(bert)
    config = BertConfig(
        vocab_size=len(vocabulary),
        hidden_size=16,
        num_hidden_layers=2,
        num_attention_heads=2,
        intermediate_size=32,
        max_position_embeddings=64,
    )
    torch.manual_seed(0)
    BertModel(config).save_pretrained(bert)
    modules = [Transformer(str(bert)), Pooling(16), Normalize()]
    SentenceTransformer(modules=modules).save(str(folder))
    return folder


@pytest.fixture(scope="module")
def encoder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return random_encoder(tmp_path_factory.mktemp("encoders") / "tiny")


@pytest.fixture
def copied(encoder: Path, tmp_path: Path) -> Path:
    return Path(shutil.copytree(encoder, tmp_path / "copy"))


FIRST = ["a red house", "the dog sits on a long wall near the sea", "a", "a red house", ""]
SECOND = ["a red house", "a cat", "the dog sits on a long wall", "a cat", "a cat"]


def by_definition(folder: Path, first: str, second: str) -> float:
    """Cosine of the means over tokens, one text at a time."""
    tokenizer = AutoTokenizer.from_pretrained(folder)
    model = AutoModel.from_pretrained(folder).eval()
    with torch.inference_mode():
        a, b = (
            model(**tokenizer(text, return_tensors="pt")).last_hidden_state[0].mean(0)
            for text in (first, second)
        )
    return float(torch.cosine_similarity(a, b, dim=0))


def test_an_encoder_gives_the_cosine_of_mean_embeddings(encoder: Path) -> None:
    values = load_similarity(str(encoder))(FIRST, SECOND)
    expected = [by_definition(encoder, a, b) for a, b in zip(FIRST, SECOND, strict=True)]
    assert values == pytest.approx(expected, abs=1e-5)
    assert values[0] == pytest.approx(1.0, abs=1e-6)
    assert values[1] < 0.999


def test_batch_size_does_not_change_the_similarity(encoder: Path) -> None:
    whole = load_similarity(str(encoder), device="cpu")
    one_by_one = load_similarity(str(encoder), device="cpu", batch_size=1)
    assert whole(FIRST, SECOND) == whole(FIRST, SECOND)
    assert one_by_one(FIRST, SECOND) == pytest.approx(whole(FIRST, SECOND), abs=1e-6)
    alone = [whole([a], [b])[0] for a, b in zip(FIRST, SECOND, strict=True)]
    assert alone == pytest.approx(whole(FIRST, SECOND), abs=1e-6)
    assert whole([], []) == []


def test_the_identity_depends_on_file_contents_and_not_on_their_location(
    encoder: Path, copied: Path
) -> None:
    identity = similarity_identity(str(encoder))
    assert identity["name"] == "tiny"
    assert {"model.safetensors", "modules.json", "1_Pooling/config.json"} <= set(identity)
    moved = similarity_identity(str(copied))
    assert moved | {"name": "tiny"} == identity
    (copied / "README.md").write_text("other words")
    assert similarity_identity(str(copied)) == moved
    (copied / "1_Pooling" / "config.json").write_text("{}")
    assert similarity_identity(str(copied)) != moved
    assert similarity_identity("lexical") == {"name": "lexical"}


def test_code_in_a_model_folder_is_refused_and_not_run(copied: Path) -> None:
    modules = json.loads((copied / "modules.json").read_text())
    modules[1]["type"] = "evil.Pooling"
    (copied / "modules.json").write_text(json.dumps(modules))
    (copied / "evil.py").write_text("raise SystemExit('it ran')")
    for load in (load_similarity, similarity_identity):
        with pytest.raises(
            RefusedError, match=r"must name modules of sentence_transformers, got 'e"
        ):
            load(str(copied))


@pytest.mark.parametrize("pattern", ["**/model.safetensors", "**/tokenizer.json"])
def test_a_damaged_encoder_is_refused(copied: Path, pattern: str) -> None:
    (file,) = copied.glob(pattern)
    file.write_bytes(file.read_bytes()[:100])
    with pytest.raises(RefusedError, match=r"similarity .*copy must hold whole files that its lib"):
        load_similarity(str(copied))


def test_weights_that_are_not_safetensors_are_refused(copied: Path) -> None:
    (copied / "model.safetensors").rename(copied / "pytorch_model.bin")
    with pytest.raises(RefusedError, match="must have its weights in safetensors, got none"):
        load_similarity(str(copied))


def test_a_folder_that_is_not_an_encoder_is_refused(tmp_path: Path) -> None:
    with pytest.raises(RefusedError, match=r"has neither modules\.json nor config\.json"):
        load_similarity(str(tmp_path))
    for name in (str(tmp_path / "none"), "./none", "a/b/c"):
        with pytest.raises(
            RefusedError, match=r"must be lexical, a folder or a hub id, got .*(none|a/b/c), wh"
        ):
            load_similarity(name)


def test_a_hub_id_that_cannot_be_downloaded_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    with pytest.raises(
        RefusedError, match=r"the hub cannot be reached, got 'no/such-encoder', which"
    ):
        load_similarity("no/such-encoder")
