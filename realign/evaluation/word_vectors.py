"""Similarity of words by the vectors of a spaCy model, which the user installs."""

from __future__ import annotations

import functools
from collections.abc import Sequence
from importlib import import_module
from importlib.util import find_spec
from typing import Any

from realign.errors import RefusedError

THRESHOLD = 0.8  # of AMBER's script


def are_alike(models: Sequence[str], word: str, other: str) -> bool:
    """Return whether the cosine of the vectors of two words is above 0.8.

    Args:
        models: Names of spaCy models; the first installed one is used.
        word: First word.
        other: Second word.
    Raises:
        RefusedError: spaCy or every one of the models is missing.
    """
    return _similarity(tuple(models), word, other) > THRESHOLD


@functools.lru_cache(maxsize=1 << 20)
def _similarity(models: tuple[str, ...], word: str, other: str) -> float:
    return float(_document(models, word).similarity(_document(models, other)))


@functools.lru_cache(maxsize=1 << 14)
def _document(models: tuple[str, ...], word: str) -> Any:
    return _model(models)(word)


@functools.cache
def _model(models: tuple[str, ...]) -> Any:
    if find_spec("spacy") is None:
        raise RefusedError(
            f"This rule requires spaCy with {models[0]}, which is not installed. Run pip install "
            f"spacy and python -m spacy download {models[0]}, or name the rule exact-words."
        )
    for model in models:
        if find_spec(model):
            return import_module("spacy").load(model)
    raise RefusedError(
        f"This rule requires {' or '.join(models)} of spaCy, got none. Run python -m spacy "
        f"download {models[0]}, or name the rule exact-words."
    )
