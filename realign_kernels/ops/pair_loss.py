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
from realign_kernels.ops.schema import operator
from realign_kernels.sequences import PairShape, check_counts, check_sequence_id_values
from realign_kernels.validation import check_chosen_present, check_no_tangent


class PairArguments(NamedTuple):
    """A preference batch, as every operator of one takes it."""

    labels: Tensor
    sequence_ids: Tensor | None
    sequence_lengths: Tensor | None  # (C, P), on the CPU
    ref_logps: Tensor | None  # (C, P)
    ignore_index: int
    pair_shape: list[int]
    terms: list[float]  # the table of the objective, row by row
    nll_weight: float

    @property
    def pairs(self) -> PairShape:
        """Cells by pairs."""
        return PairShape(*self.pair_shape)

    @property
    def objective(self) -> Objective:
        """The objective of the table."""
        rows = [self.terms[start : start + 9] for start in range(0, len(self.terms), 9)]
        return Objective.from_table(rows, self.nll_weight)


class TokenArguments(NamedTuple):
    """Scores of a preference batch, and the backend that reduces them."""

    token_logps: Tensor
    backend: str


class PairOutputs(NamedTuple):
    """Outputs of the operator, in the order of its schema; dtype of the token scores."""

    loss: Tensor  # ()
    logps: Tensor  # (C, P)
    num_tokens: Tensor  # (C, P), int64
    rewards: Tensor  # (C, P)
    text_margins: Tensor  # (P,)
    image_margins: Tensor  # (P,)
    coefficients: Tensor  # (C, P), of the sums: derivative of the loss in logps


@operator("pair_loss", TokenArguments, PairArguments, returns=PairOutputs)
def pair_loss_op(token_logps: Tensor, backend: str, *values: Any) -> PairOutputs:
    """Sum per sequence and apply an objective."""
    batch = PairArguments(*values)
    labels, sequence_lengths = batch.labels, batch.sequence_lengths
    if batch.sequence_ids is not None:
        is_scored = labels != batch.ignore_index
        check_sequence_id_values(batch.sequence_ids, is_scored, batch.pairs.num_sequences)
    outputs = reduce_pairs(token_logps, backend, batch, batch.objective)
    if sequence_lengths is not None:
        check_chosen_present(sequence_lengths)
        check_counts(outputs.num_tokens, sequence_lengths)
    elif labels.device.type == "cpu":
        check_chosen_present(outputs.num_tokens)
    return outputs


@pair_loss_op.register_fake
def _pair_loss_fake(token_logps: Tensor, backend: str, *values: Any) -> PairOutputs:
    batch = PairArguments(*values)
    num_cells, num_pairs = batch.pair_shape
    new = token_logps.new_empty
    return PairOutputs(
        loss=new(()),
        logps=new((num_cells, num_pairs)),
        num_tokens=batch.labels.new_empty((num_cells, num_pairs)),
        rewards=new((num_cells, num_pairs)),
        text_margins=new(num_pairs),
        image_margins=new(num_pairs),
        coefficients=new((num_cells, num_pairs), dtype=_sum_dtype(token_logps.device)),
    )


def reduce_pairs(
    token_logps: Tensor, backend: str, batch: PairArguments, objective: Objective
) -> PairOutputs:
    """Run the kernel of a backend; nothing is checked."""
    pairs, ref_logps = batch.pairs, batch.ref_logps
    wide: Any = {"dtype": _sum_dtype(token_logps.device), "device": token_logps.device}
    results = PairResults(
        loss=torch.empty(1, **wide),
        logps=torch.empty(pairs, **wide),
        counts=torch.empty(pairs, dtype=torch.int64, device=token_logps.device),
        rewards=torch.empty(pairs, **wide),
        text_margins=torch.empty(pairs.num_pairs, **wide),
        image_margins=torch.empty(pairs.num_pairs, **wide),
        coefficients=torch.empty(pairs, **wide),
    )
    kernels_of(backend).pair_loss(
        PairBatch(
            token_logps=token_logps.contiguous(),
            labels=batch.labels.contiguous(),
            ignore_index=batch.ignore_index,
            sequence_ids=None if batch.sequence_ids is None else batch.sequence_ids.contiguous(),
            num_cells=pairs.num_cells,
            num_pairs=pairs.num_pairs,
            ref_logps=None if ref_logps is None else ref_logps.to(wide["dtype"]).contiguous(),
            objective=objective,
        ),
        results,
    )
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


def _sum_dtype(device: torch.device) -> torch.dtype:
    # Apple's GPUs have no float64.
    return torch.float32 if device.type == "mps" else torch.float64


class PairBackwardArguments(NamedTuple):
    """Slopes from above, and what the forward has kept."""

    grad_loss: Tensor | None
    grad_logps: Tensor | None
    coefficients: Tensor
    labels: Tensor
    sequence_ids: Tensor | None
    ignore_index: int
    dtype: torch.dtype


@operator("pair_loss_backward", PairBackwardArguments, returns="Tensor")
def pair_loss_backward_op(*values: Any) -> Tensor:
    """Return the gradient by token scores: that of its sequence for every scored token."""
    kept = PairBackwardArguments(*values)
    labels, grad = kept.labels, torch.zeros_like(kept.coefficients)
    if kept.grad_loss is not None:
        grad = grad + kept.grad_loss.to(grad.dtype) * kept.coefficients
    if kept.grad_logps is not None:
        grad = grad + kept.grad_logps.to(grad.dtype)
    is_scored = labels != kept.ignore_index
    if grad.numel() == 0:  # no pairs, whatever tokens there are
        return torch.zeros_like(labels, dtype=kept.dtype, memory_format=torch.contiguous_format)
    if kept.sequence_ids is None:
        per_token = grad.reshape(-1, 1).expand(labels.shape)
    else:
        # Ids of ignored tokens may be anything.
        per_token = grad.reshape(-1)[torch.where(is_scored, kept.sequence_ids, 0)]
    return torch.where(is_scored, per_token, 0.0).to(kept.dtype).contiguous()


@pair_loss_backward_op.register_fake
def _pair_loss_backward_fake(*values: Any) -> Tensor:
    kept = PairBackwardArguments(*values)
    return kept.labels.new_empty(kept.labels.shape, dtype=kept.dtype)


def _setup_context(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, ...]) -> None:
    token_logps, _, *values = inputs
    batch = PairArguments(*values)
    ctx.options = batch.ignore_index, token_logps.dtype
    ctx.set_materialize_grads(False)
    ctx.mark_non_differentiable(*output[2:])
    ctx.save_for_backward(PairOutputs(*output).coefficients, batch.labels, batch.sequence_ids)


def _backward(
    ctx: Any, grad_loss: Tensor | None, grad_logps: Tensor | None, *_: None
) -> tuple[Tensor | None, ...]:
    for given in (grad_loss, grad_logps):
        check_no_tangent("the gradient from above", given)
    grad = None
    if grad_loss is not None or grad_logps is not None:
        grad = pair_loss_backward_op(grad_loss, grad_logps, *ctx.saved_tensors, *ctx.options)
    return (grad, None, *(None,) * len(PairArguments._fields))


pair_loss_op.register_autograd(_backward, setup_context=_setup_context)
differentiate_once(pair_loss_backward_op)
