"""Benchmarks: their files, rules and scores."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from realign.evaluation.answer_scores import score as score

__all__ = ["score"]


def __getattr__(name: str) -> Any:
    if name not in __all__:
        raise AttributeError(f"module 'realign.evaluation' has no attribute {name!r}")
    from realign.evaluation.answer_scores import score

    return score
