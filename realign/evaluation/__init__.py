"""Benchmarks: their files, rules, scores and comparisons."""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from realign.evaluation.answer_comparison import compare as compare
    from realign.evaluation.answer_scores import score as score
    from realign.evaluation.answer_writing import write as write

_PLACES = {"compare": "answer_comparison", "score": "answer_scores", "write": "answer_writing"}
__all__ = ["compare", "score", "write"]


def __getattr__(name: str) -> Any:
    if name not in _PLACES:
        raise AttributeError(f"module 'realign.evaluation' has no attribute {name!r}")
    return getattr(import_module(f"realign.evaluation.{_PLACES[name]}"), name)
