"""Operators that are a derivative already, and have none of their own."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor


def differentiate_once(operator: Any) -> None:
    """Make a second derivative an error that says what to do, not a wrong number."""
    operator.register_autograd(_refuse)


def second_order_witness(*inputs: Tensor | None) -> Tensor | None:
    """Return a 0 that autograd knows to come from the inputs, without keeping their memory.

    A gradient that was taken in the forward depends on nothing that autograd knows of.  An operator
    that takes the witness too has a derivative, which is refused.
    """
    if not torch.is_grad_enabled():
        return None
    zeros = [part[:0].sum() for part in inputs if part is not None and part.requires_grad]
    return torch.stack([zero.float() for zero in zeros]).sum() if zeros else None


class _Once(torch.autograd.Function):
    """The identity on gradients, with inputs that they depend on."""

    @staticmethod
    def forward(ctx: Any, num_gradients: int, *tensors: Tensor) -> tuple[Tensor, ...]:
        return tuple(tensor.view_as(tensor) for tensor in tensors[:num_gradients])

    @staticmethod
    def backward(ctx: Any, *grads: Tensor | None) -> Any:
        _refuse(ctx, *grads)


def once(gradients: list[Tensor | None], inputs: list[Tensor | None]) -> list[Tensor | None]:
    """Return the gradients that a ``Function`` gives, refused where one is differentiated again."""
    if not torch.is_grad_enabled():
        return gradients
    present = [gradient for gradient in gradients if gradient is not None]
    apply: Any = _Once.apply
    tied = iter(apply(len(present), *present, *(part for part in inputs if part is not None)))
    return [None if gradient is None else next(tied) for gradient in gradients]


def _refuse(ctx: Any, *grads: Any) -> None:
    raise NotImplementedError(
        "linear_logprob and rdpo_loss must be differentiated once, got a second time. "
        "Drop create_graph=True."
    )
