"""Operators that are a derivative already, and have none of their own."""

from __future__ import annotations

from typing import Any


def differentiate_once(operator: Any) -> None:
    """Make a second derivative an error that says what to do, not a wrong number."""
    operator.register_autograd(_refuse)


def _refuse(ctx: Any, *grads: Any) -> None:
    raise NotImplementedError(
        "linear_logprob and rdpo_loss must be differentiated once, got a second time. "
        "Drop create_graph=True."
    )
