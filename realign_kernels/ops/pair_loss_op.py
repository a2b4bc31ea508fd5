"""The reduction of a preference batch as an operator of torch: token scores in, loss out.

Knows no vocabulary.  Letters: **P** pairs, **C** cells.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
from torch import Tensor

from realign_kernels.backends.dispatch import kernels_of
from realign_kernels.backends.kernel_set import PairBatch, PairResults
from realign_kernels.first_order import differentiate_once
from realign_kernels.objective import Objective
from realign_kernels.sequences import PairShape, check_counts, check_sequence_id_values
from realign_kernels.validation import check_chosen_present


class PairOutputs(NamedTuple):
    """Outputs of the operator, in the order of its schema; dtype of the token scores."""

    loss: Tensor  # ()
    logps: Tensor  # (C, P)
    num_tokens: Tensor  # (C, P), int64
    rewards: Tensor  # (C, P)
    text_margins: Tensor  # (P,)
    image_margins: Tensor  # (P,)
    coefficients: Tensor  # (C, P), float64: derivative of the loss in logps


@torch.library.custom_op("realign::pair_loss", mutates_args=())
def pair_loss_op(
    token_logps: Tensor,
    labels: Tensor,
    sequence_ids: Tensor | None,
    sequence_lengths: Tensor | None,
    ref_logps: Tensor | None,
    ignore_index: int,
    pair_shape: list[int],
    terms: list[float],
    nll_weight: float,
    backend: str,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor]:
    """Sum per sequence and apply an objective; ``terms`` is its table, row by row."""
    objective = Objective.from_table(rows_of_table(terms), nll_weight)
    pairs = PairShape(*pair_shape)
    if sequence_ids is not None:
        check_sequence_id_values(sequence_ids, labels != ignore_index, pairs.num_sequences)
    outputs = reduce_pairs(
        token_logps, labels, sequence_ids, ref_logps, ignore_index, pairs, objective, backend
    )
    if sequence_lengths is not None:
        check_chosen_present(sequence_lengths)
        check_counts(outputs.num_tokens, sequence_lengths)
    elif labels.device.type == "cpu":
        check_chosen_present(outputs.num_tokens)
    return outputs


@pair_loss_op.register_fake
def _pair_loss_fake(
    token_logps: Tensor,
    labels: Tensor,
    sequence_ids: Tensor | None,
    sequence_lengths: Tensor | None,
    ref_logps: Tensor | None,
    ignore_index: int,
    pair_shape: list[int],
    terms: list[float],
    nll_weight: float,
    backend: str,
) -> tuple[Tensor, ...]:
    num_pairs = pair_shape[1]
    return PairOutputs(
        loss=token_logps.new_empty(()),
        logps=token_logps.new_empty(pair_shape),
        num_tokens=labels.new_empty(pair_shape),
        rewards=token_logps.new_empty(pair_shape),
        text_margins=token_logps.new_empty(num_pairs),
        image_margins=token_logps.new_empty(num_pairs),
        coefficients=token_logps.new_empty(pair_shape, dtype=torch.float64),
    )


def reduce_pairs(
    token_logps: Tensor,
    labels: Tensor,
    sequence_ids: Tensor | None,
    ref_logps: Tensor | None,
    ignore_index: int,
    pairs: PairShape,
    objective: Objective,
    backend: str,
) -> PairOutputs:
    """Run the kernel of a backend; nothing is checked."""
    wide: Any = {"dtype": torch.float64, "device": token_logps.device}
    results = PairResults(
        loss=torch.empty(1, **wide),
        logps=torch.empty(pairs, **wide),
        counts=torch.empty(pairs, dtype=torch.int64, device=token_logps.device),
        rewards=torch.empty(pairs, **wide),
        text_margins=torch.empty(pairs.num_pairs, **wide),
        image_margins=torch.empty(pairs.num_pairs, **wide),
        coefficients=torch.empty(pairs, **wide),
    )
    batch = PairBatch(
        token_logps=token_logps.contiguous(),
        labels=labels.contiguous(),
        ignore_index=ignore_index,
        sequence_ids=None if sequence_ids is None else sequence_ids.contiguous(),
        num_cells=pairs.num_cells,
        num_pairs=pairs.num_pairs,
        ref_logps=None if ref_logps is None else ref_logps.to(torch.float64).contiguous(),
        objective=objective,
    )
    kernels_of(backend).pair_loss(batch, results)
    dtype = token_logps.dtype
    return PairOutputs(
        loss=results.loss.to(dtype, copy=True).reshape(()),
        logps=results.logps.to(dtype),
        num_tokens=results.counts,
        rewards=results.rewards.to(dtype),
        text_margins=results.text_margins.to(dtype),
        image_margins=results.image_margins.to(dtype),
        coefficients=results.coefficients,
    )


@torch.library.custom_op("realign::pair_loss_backward", mutates_args=())
def pair_loss_backward_op(
    grad_loss: Tensor | None,
    grad_logps: Tensor | None,
    coefficients: Tensor,
    labels: Tensor,
    sequence_ids: Tensor | None,
    ignore_index: int,
    dtype: torch.dtype,
) -> Tensor:
    """Return the gradient by token scores: that of its sequence for every scored token."""
    grad = torch.zeros_like(coefficients)
    if grad_loss is not None:
        grad = grad + grad_loss.to(grad.dtype) * coefficients
    if grad_logps is not None:
        grad = grad + grad_logps.to(grad.dtype)
    is_scored = labels != ignore_index
    if grad.numel() == 0:  # no pairs, whatever tokens there are
        return torch.zeros_like(labels, dtype=dtype, memory_format=torch.contiguous_format)
    if sequence_ids is None:
        per_token = grad.reshape(-1, 1).expand(labels.shape)
    else:
        # Ids of ignored tokens may be anything.
        per_token = grad.reshape(-1)[torch.where(is_scored, sequence_ids, 0)]
    return torch.where(is_scored, per_token, 0.0).to(dtype).contiguous()


@pair_loss_backward_op.register_fake
def _pair_loss_backward_fake(
    grad_loss: Tensor | None,
    grad_logps: Tensor | None,
    coefficients: Tensor,
    labels: Tensor,
    sequence_ids: Tensor | None,
    ignore_index: int,
    dtype: torch.dtype,
) -> Tensor:
    return labels.new_empty(labels.shape, dtype=dtype)


def _setup_context(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, ...]) -> None:
    token_logps, labels, sequence_ids, _, _, ignore_index, *_ = inputs
    outputs = PairOutputs(*output)
    ctx.ignore_index, ctx.dtype = ignore_index, token_logps.dtype
    ctx.set_materialize_grads(False)
    ctx.mark_non_differentiable(*output[2:])
    ctx.save_for_backward(outputs.coefficients, labels, sequence_ids)


def _backward(
    ctx: Any, grad_loss: Tensor | None, grad_logps: Tensor | None, *_: None
) -> tuple[Tensor | None, ...]:
    none = (None,) * 9
    if grad_loss is None and grad_logps is None:
        return (None, *none)
    coefficients, labels, sequence_ids = ctx.saved_tensors
    grad = pair_loss_backward_op(
        grad_loss, grad_logps, coefficients, labels, sequence_ids, ctx.ignore_index, ctx.dtype
    )
    return (grad, *none)


pair_loss_op.register_autograd(_backward, setup_context=_setup_context)
differentiate_once(pair_loss_backward_op)


def rows_of_table(terms: list[float]) -> list[list[float]]:
    """Cut a flat table into its rows of nine."""
    return [terms[start : start + 9] for start in range(0, len(terms), 9)]
