"""Similarity of two answers, at most 1: lexical, or by a sentence-transformers model."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from importlib.util import find_spec
from pathlib import Path
from typing import Any

from realign.data.lexical import lexical
from realign.errors import RefusedError
from realign.modeling.damaged_files import refuse_damaged_files
from realign.modeling.folder import download
from realign.runtime.files import file_sha256
from realign.runtime.strict_json import read_json

Similarity = Callable[[Sequence[str], Sequence[str]], list[float]]

LEXICAL = "lexical"
ENCODER_FILES = ("*.json", "*.txt", "*.model", "*.safetensors")


def load_similarity(name: str, device: str | None = None, batch_size: int = 32) -> Similarity:
    """Return a similarity by name.

    Args:
        name: ``lexical``, or a sentence-transformers model (hub id or folder), whose cosines are
            used.
        device: Device of the model; by default the GPU if there is one.
        batch_size: Texts per call of the model.
    Raises:
        RefusedError: sentence-transformers is not installed, there is no such model, it is
            damaged, or it has pickled weights or code of its own.
    """
    if name == LEXICAL:
        return lambda first, second: [lexical(a, b) for a, b in zip(first, second, strict=True)]
    folder = _encoder_folder(name)
    from sentence_transformers import SentenceTransformer

    with refuse_damaged_files(f"similarity {name}"):
        encoder: Any = SentenceTransformer(str(folder), device=device)

    def cosine(first: Sequence[str], second: Sequence[str]) -> list[float]:
        # equal texts are encoded once
        place = {text: i for i, text in enumerate(dict.fromkeys([*first, *second]))}
        if not place:
            return []
        vectors = encoder.encode(
            list(place),
            batch_size=batch_size,
            convert_to_tensor=True,
            normalize_embeddings=True,
            show_progress_bar=False,
        )
        a, b = ([place[text] for text in texts] for texts in (first, second))
        return (vectors[a].float() * vectors[b].float()).sum(1).tolist()

    return cosine


def similarity_identity(name: str) -> dict[str, str]:
    """Return the identity of a similarity: its name, and the SHA-256 of the encoder's files.

    Args:
        name: As for :func:`load_similarity`.
    Raises:
        RefusedError: For the reasons of :func:`load_similarity`.
    """
    if name == LEXICAL:
        return {"name": LEXICAL}
    folder = _encoder_folder(name)
    files = sorted({path for pattern in ENCODER_FILES for path in folder.rglob(pattern)})
    return {
        # the identity of a folder does not depend on its place
        "name": folder.name if Path(name).is_dir() else name,
        **{path.relative_to(folder).as_posix(): file_sha256(path) for path in files},
    }


def _encoder_folder(name: str) -> Path:
    """Return the folder of an encoder, after checking that its weights are safetensors and its
    modules those of sentence-transformers.
    """
    if find_spec("sentence_transformers") is None:
        raise RefusedError(
            f"similarity {name!r} requires sentence-transformers. Install "
            f"'realign[pipeline,similarity]' or use lexical."
        )
    folder = Path(name)
    if not folder.is_dir():
        folder = _downloaded(name)
    # without modules.json, it is a transformers model, and the mean over its tokens is used
    modules = folder / "modules.json"
    if not modules.is_file() and not (folder / "config.json").is_file():
        raise RefusedError(
            f"similarity must be a sentence-transformers folder, got {name}, which has neither "
            "modules.json nor config.json. Check the path."
        )
    for module in read_json(modules) if modules.is_file() else []:
        if not str(module.get("type")).startswith("sentence_transformers."):
            raise RefusedError(
                f"{modules} must name modules of sentence_transformers, got "
                f"{module.get('type')!r}, which is code that comes with the model. Use another "
                "model."
            )
    if not any(folder.rglob("*.safetensors")):
        raise RefusedError(
            f"similarity {name} must have its weights in safetensors, got none. Convert the model "
            "or use another."
        )
    return folder


def _downloaded(name: str) -> Path:
    if Path(name).is_absolute() or name.startswith(".") or name.count("/") > 1:
        raise RefusedError(
            f"similarity must be lexical, a folder or a hub id, got {name}, which does not exist. "
            "Check the path."
        )
    return download(name, ENCODER_FILES, "similarity", "Check it, or use lexical.")
