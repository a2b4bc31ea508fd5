"""Operators that compute a derivative and cannot be differentiated again."""

from __future__ import annotations

from typing import Any


def differentiate_once(operator: Any) -> None:
    """Turn a second derivative into an error with a remedy, instead of a wrong number."""
    operator.register_autograd(_refuse)


def _refuse(ctx: Any, *grads: Any) -> None:
    raise NotImplementedError(
        "linear_logprob and rdpo_loss must be differentiated once, got a second time. "
        "Drop create_graph=True."
    )
