"""The shift of labels to the positions that predict them."""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch

from realign_kernels.validation import (
    assert_on_device,
    check_flag,
    check_int64,
    check_integer,
    check_tensor,
    value_checks_enabled,
)

if TYPE_CHECKING:
    from torch import Tensor


def shift_labels(
    labels: Tensor,
    is_answer: Tensor | None = None,
    *,
    ignore_index: int = -100,
    allow_absent: bool = False,
) -> Tensor:
    """Return labels moved one position to the left, to the hidden state that predicts each.

    :func:`linear_logprob` and :func:`rdpo_loss` score the label at the position of each hidden
    state.  Labels from a tokenizer or collator are one position later; unshifted, they give another
    loss without an error.  The shape is kept: slice neither the labels nor the hidden states.

    Args:
        labels: Token ids of whole sequences as a tokenizer gives them, not yet shifted, shape
            ``(..., T)``, int64; ``ignore_index`` where a token is not to be scored.
        is_answer: Mask of the tokens to score, bool, same shape; it is shifted like the labels.
            With a mask, ``labels`` can simply be the ``input_ids``. None scores every label that is
            not ``ignore_index``.
        ignore_index: Label of positions that are not scored.
        allow_absent: Whether a sequence may have no scored token. To the losses it is an absent
            cell: every term that reads it adds 0 for that pair.
    Returns:
        shifted: Shape ``(..., T)``, int64.  The last position, which predicts nothing, has
            ``ignore_index``.  The first token of a sequence has no state before it and is never
            scored.
    Raises:
        ValueError: A shape or device does not fit, or a sequence has no scored token (which a
            device-side assertion finds on a GPU; ``REALIGN_CHECK=0`` turns the check off).
        TypeError: A dtype does not fit.

    Example::

        >>> import torch
        >>> from realign_kernels import shift_labels
        >>> input_ids = torch.tensor([[5, 6, 7, 8, 0]])
        >>> is_answer = torch.tensor([[False, False, True, True, False]])
        >>> shift_labels(input_ids, is_answer)
        tensor([[-100,    7,    8, -100, -100]])
    """
    check_tensor("labels", labels)
    check_tensor("is_answer", is_answer, optional=True)
    check_integer("ignore_index", ignore_index)
    check_flag("allow_absent", allow_absent)
    if labels.ndim == 0:
        raise ValueError("labels must have shape (..., T), got (). Pass whole sequences.")
    check_int64("labels", labels)
    if is_answer is not None:
        _check_mask(is_answer, labels)
        labels = torch.where(is_answer, labels, ignore_index)
    # Not by F.pad, which takes the value as a float64 and so rounds large integers.
    last = torch.full_like(labels[..., :1], ignore_index)  # nothing in an empty sequence
    shifted = torch.cat([labels[..., 1:], last], dim=-1)
    if not allow_absent and value_checks_enabled() and not torch.compiler.is_compiling():
        _check_present((shifted != ignore_index).any(dim=-1))
    return shifted


def _check_mask(is_answer: Tensor, labels: Tensor) -> None:
    if is_answer.dtype != torch.bool:
        raise TypeError(f"is_answer must be torch.bool, got {is_answer.dtype}. Call .bool().")
    if is_answer.shape != labels.shape:
        raise ValueError(
            f"is_answer must have shape {tuple(labels.shape)} to match labels, "
            f"got {tuple(is_answer.shape)}. Pass both unshifted: both are shifted here."
        )
    if is_answer.device != labels.device:
        raise ValueError(
            f"is_answer must be on {labels.device} to match labels, got {is_answer.device}. "
            f"Call .to({str(labels.device)!r})."
        )


def _check_present(is_present: Tensor) -> None:
    """Refuse sequences without a scored token."""
    rule = "labels must hold a token that is scored in every sequence, after its first token"
    remedy = (
        "Raise the maximum length, or drop the pair; pass allow_absent=True to leave such cells "
        "out of the loss."
    )
    if is_present.is_cuda:
        assert_on_device(is_present.all(), f"{rule}. {remedy}")
    elif not is_present.all():
        rows = torch.nonzero(~is_present.reshape(-1)).squeeze(1).tolist()
        raise ValueError(f"{rule}, got none in sequences {rows[:8]}. {remedy}")
