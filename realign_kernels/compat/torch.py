"""The head behind the signature of ``torch.nn.functional.linear_cross_entropy``."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from realign_kernels.compat.messages import call_with_names
from realign_kernels.linear_logprob import linear_logprob
from realign_kernels.validation import check_choice, check_integer, check_number, check_tensor

REDUCTIONS = ("none", "mean", "sum")
_NAMES = {
    "hidden_states": "input",
    "lm_head_weight": "linear_weight",
    "labels": "target",
    "lm_head_bias": "linear_bias",
}


def linear_cross_entropy(
    input: Tensor,
    linear_weight: Tensor,
    target: Tensor,
    *,
    linear_bias: Tensor | None = None,
    weight: Tensor | None = None,
    reduction: str = "mean",
    ignore_index: int | None = None,
    label_smoothing: float = 0.0,
    options: Any = None,
    out_dtype: torch.dtype | None = None,
) -> Tensor:
    """Return the cross entropy of class indices, without storing logits or rounding them.

    It takes the arguments of ``torch.nn.functional.linear_cross_entropy`` (torch 2.13), and equals
    ``cross_entropy(linear(input, linear_weight, linear_bias), target, ...)``.

    Args:
        input: Samples, shape ``(..., D)``; float16, bfloat16, float32 or float64.
        linear_weight: Projection to classes, shape ``(V, D)``.  It may have another half or float32
            dtype than ``input``, as in :func:`realign_kernels.linear_logprob`.
        target: Class indices, shape ``(...)``, int64, each in ``[0, V)`` or ``ignore_index``.
        linear_bias: Shape ``(V,)``.
        weight: Factor of each class, shape ``(V,)``, a floating dtype; differentiable.
        reduction: ``"none"``, ``"sum"``, or ``"mean"``: the sum divided by the number of targets
            that are not ignored, or by the sum of their class factors.
        ignore_index: Target of samples that count nowhere and get no gradient; None for -100.
        label_smoothing: Must be 0.
        options: Not read: torch's choice of chunks.
        out_dtype: Dtype of the result, which is computed in float32 (float64 for float64 inputs)
            and rounded last; None means the dtype of ``input``, as in torch, or float32 under
            autocast.  Rounded to bfloat16, a loss of 10 is off by up to 3e-2: pass
            ``torch.float32`` to keep all digits.
    Returns:
        loss: Shape ``(...)`` for ``"none"``, else ``()``; NaN for the mean of no target.
    Raises:
        ValueError: A shape, device, target or name does not fit.
        TypeError: A dtype or type does not fit.
        NotImplementedError: ``label_smoothing`` is not 0, ``linear_weight`` has more than two
            dimensions, or ``target`` holds class probabilities; also as
            :func:`realign_kernels.linear_logprob`.
    Note: Differentiable once, in reverse mode only; the backward keeps as much memory as that of
        :func:`realign_kernels.linear_logprob`.

    Example::

        >>> import torch
        >>> from realign_kernels.compat.torch import linear_cross_entropy
        >>> hidden_states = torch.zeros(2, 8, requires_grad=True)  # (N, D)
        >>> loss = linear_cross_entropy(hidden_states, torch.zeros(5, 8), torch.tensor([3, 1]))
        >>> loss
        tensor(1.6094, grad_fn=...)
        >>> loss.backward()
    """
    check_tensor("input", input)
    if type(linear_weight).__name__ != "DTensor":  # which the head gathers
        check_tensor("linear_weight", linear_weight)
    check_tensor("target", target)
    check_choice("reduction", reduction, REDUCTIONS)
    if ignore_index is None:
        ignore_index = -100
    check_integer("ignore_index", ignore_index)
    _refuse_other_losses(linear_weight, target, label_smoothing)
    _check_class_weights(weight, linear_weight)
    dtype = _result_dtype(input, out_dtype)
    token_logps = call_with_names(
        linear_logprob, _NAMES, input, linear_weight, target,
        lm_head_bias=linear_bias, ignore_index=ignore_index,
    )  # fmt: skip
    losses, is_scored = 0 - token_logps, target != ignore_index  # not -0.0 where ignored
    factors = is_scored
    if weight is not None:
        # An ignored target need not be a class.
        factors = weight.to(losses.dtype)[torch.where(is_scored, target, 0)]
        factors = torch.where(is_scored, factors, 0.0)
        losses = losses * factors
    if reduction == "mean":
        losses = losses.sum() / factors.sum()
    elif reduction == "sum":
        losses = losses.sum()
    return losses.to(dtype)


def _refuse_other_losses(linear_weight: Tensor, target: Tensor, label_smoothing: float) -> None:
    """Refuse every loss but the log-probability of one class per sample."""
    torch_function = "Call torch.nn.functional.linear_cross_entropy for it."
    check_number("label_smoothing", label_smoothing)
    if label_smoothing != 0:
        raise NotImplementedError(
            f"label_smoothing must be 0, got {label_smoothing}. {torch_function}"
        )
    if linear_weight.ndim > 2:
        raise NotImplementedError(
            f"linear_weight must have shape (V, D), got {tuple(linear_weight.shape)}. "
            f"{torch_function}"
        )
    if target.is_floating_point():
        raise NotImplementedError(
            f"target must hold class indices, got probabilities of shape {tuple(target.shape)} and "
            f"dtype {target.dtype}. {torch_function}"
        )


def _check_class_weights(weight: Tensor | None, linear_weight: Tensor) -> None:
    check_tensor("weight", weight, optional=True)
    if weight is None:
        return
    if not weight.is_floating_point():
        raise TypeError(f"weight must be of a floating dtype, got {weight.dtype}. Call .float().")
    if weight.shape != linear_weight.shape[:1]:
        raise ValueError(
            f"weight must have shape {tuple(linear_weight.shape[:1])} to match linear_weight, "
            f"got {tuple(weight.shape)}. Give one factor for every class."
        )
    if weight.device != linear_weight.device:
        raise ValueError(
            f"weight must be on {linear_weight.device} to match linear_weight, "
            f"got {weight.device}. Call .to({str(linear_weight.device)!r})."
        )


def _result_dtype(input: Tensor, out_dtype: torch.dtype | None) -> torch.dtype:
    """Return the dtype that the result is rounded to."""
    if out_dtype is None:
        is_autocast = torch.is_autocast_enabled(input.device.type)
        return torch.float32 if is_autocast and input.dtype != torch.float64 else input.dtype
    if not (isinstance(out_dtype, torch.dtype) and out_dtype.is_floating_point):
        raise TypeError(
            f"out_dtype must be a floating torch.dtype or None, got {out_dtype!r}. "
            "Pass torch.float32."
        )
    return out_dtype
