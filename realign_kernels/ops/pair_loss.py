"""The reduction of a preference batch as an operator of torch, from token scores to the loss.

Letters: **P** pairs, **C** cells.
"""

from __future__ import annotations

import functools
from typing import Any, NamedTuple

import torch
from torch import Tensor

from realign_kernels.backends.dispatch import kernels_of, on_device_of
from realign_kernels.backends.kernel_set import (
    PairBatch,
    PairGradient,
    PairResults,
)
from realign_kernels.first_order import differentiate_once
from realign_kernels.objective import Objective
from realign_kernels.ops.schema import operator
from realign_kernels.sequences import (
    PairShape,
    assert_pairs_fit,
    check_counts,
    check_sequence_id_values,
    checks_counts,
)
from realign_kernels.validation import check_chosen_present, check_no_tangent, value_checks_enabled


class PairArguments(NamedTuple):
    """A preference batch, in the form that all its operators take."""

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
        return _objective_of(tuple(self.terms), self.nll_weight)


@functools.lru_cache(maxsize=64)
def _objective_of(terms: tuple[float, ...], nll_weight: float) -> Objective:
    rows = [list(terms[start : start + 9]) for start in range(0, len(terms), 9)]
    return Objective.from_table(rows, nll_weight)


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
    coefficients: Tensor  # (C, P): derivative of the loss with respect to logps


@operator("pair_loss", TokenArguments, PairArguments, returns=PairOutputs)
def pair_loss_op(token_logps: Tensor, backend: str, *values: Any) -> PairOutputs:
    """Sum per sequence and apply an objective."""
    batch = PairArguments(*values)
    labels, sequence_ids, lengths = batch.labels, batch.sequence_ids, batch.sequence_lengths
    if lengths is not None:
        check_chosen_present(lengths)
    kernel_checks = getattr(kernels_of(backend), "ROW_KERNELS", None) is not None
    if not kernel_checks and sequence_ids is not None:
        is_scored = labels != batch.ignore_index
        check_sequence_id_values(sequence_ids, is_scored, batch.pairs.num_sequences)
    expected = None
    if kernel_checks and lengths is not None and checks_counts(labels.device):
        expected = lengths.contiguous().to(labels.device, non_blocking=True)
    with on_device_of(labels):
        outputs, fits = reduce_pairs(token_logps, backend, batch, batch.objective, expected)
    if fits is not None and value_checks_enabled():
        assert_pairs_fit(
            fits[0] if sequence_ids is not None else None,
            fits[1] if expected is not None else None,
            batch.pairs.num_sequences,
        )
    if not kernel_checks and lengths is not None:
        check_counts(outputs.num_tokens, lengths)
    if lengths is None and labels.device.type == "cpu":
        check_chosen_present(outputs.num_tokens)
    return outputs


@pair_loss_op.register_fake
def pair_loss_fake(token_logps: Tensor, backend: str, *values: Any) -> PairOutputs:
    """Return empty outputs in the dtype of the token scores."""
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
    token_logps: Tensor,
    backend: str,
    batch: PairArguments,
    objective: Objective,
    lengths: Tensor | None = None,
) -> tuple[PairOutputs, Tensor | None]:
    """Run the kernel of a backend, and return its results.

    With them, for backends that check in the kernel: whether all ids are in range, and whether the
    counts equal ``lengths``, (2,) bool.
    """
    pairs, new = batch.pairs, token_logps.new_empty
    results = PairResults(
        loss=new(()),
        logps=new(pairs),
        counts=batch.labels.new_empty(pairs),
        rewards=new(pairs),
        text_margins=new(pairs.num_pairs),
        image_margins=new(pairs.num_pairs),
        coefficients=new(pairs, dtype=_sum_dtype(token_logps.device)),
    )
    fits = kernels_of(backend).pair_loss(
        PairBatch(
            token_logps=token_logps.contiguous(),
            labels=batch.labels.contiguous(),
            ignore_index=batch.ignore_index,
            sequence_ids=None if batch.sequence_ids is None else batch.sequence_ids.contiguous(),
            num_cells=pairs.num_cells,
            num_pairs=pairs.num_pairs,
            ref_logps=batch.ref_logps,
            objective=objective,
            lengths=lengths,
        ),
        results,
    )
    return PairOutputs(*results), fits


def _sum_dtype(device: torch.device) -> torch.dtype:
    # Apple's GPUs have no float64.
    return torch.float32 if device.type == "mps" else torch.float64


class PairBackwardArguments(NamedTuple):
    """Upstream gradients, and the tensors that the forward has kept."""

    grad_loss: Tensor | None
    grad_logps: Tensor | None
    coefficients: Tensor
    labels: Tensor
    sequence_ids: Tensor | None
    ignore_index: int
    dtype: torch.dtype
    backend: str


@operator("pair_loss_backward", PairBackwardArguments, returns="Tensor")
def pair_loss_backward_op(*values: Any) -> Tensor:
    """Return the gradient of the token scores: every scored token gets that of its sequence."""
    kept = PairBackwardArguments(*values)
    labels, row_kernels = kept.labels, getattr(kernels_of(kept.backend), "ROW_KERNELS", None)
    if row_kernels is not None:
        # Hooks on saved tensors may return them in another layout.
        ids = None if kept.sequence_ids is None else kept.sequence_ids.contiguous()
        out = labels.new_empty(labels.shape, dtype=kept.dtype)
        gradient = PairGradient(
            kept.grad_loss, kept.grad_logps, kept.coefficients.contiguous(), labels.contiguous(),
            ids, kept.ignore_index,
        )  # fmt: skip
        with on_device_of(labels):
            row_kernels.spread_gradient(gradient, out)
        return out
    grad = torch.zeros_like(kept.coefficients)
    if kept.grad_loss is not None:
        grad = grad + kept.grad_loss.to(grad.dtype) * kept.coefficients
    if kept.grad_logps is not None:
        grad = grad + kept.grad_logps.to(grad.dtype)
    is_scored = labels != kept.ignore_index
    if grad.numel() == 0:  # without pairs, no token counts
        return torch.zeros_like(labels, dtype=kept.dtype, memory_format=torch.contiguous_format)
    if kept.sequence_ids is None:
        per_token = grad.reshape(-1, 1).expand(labels.shape)
    else:
        # The ids of ignored tokens can be out of range.
        per_token = grad.reshape(-1)[torch.where(is_scored, kept.sequence_ids, 0)]
    return torch.where(is_scored, per_token, 0.0).to(kept.dtype).contiguous()


@pair_loss_backward_op.register_fake
def _pair_loss_backward_fake(*values: Any) -> Tensor:
    kept = PairBackwardArguments(*values)
    return kept.labels.new_empty(kept.labels.shape, dtype=kept.dtype)


def _setup_context(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, ...]) -> None:
    token_logps, backend, *values = inputs
    batch = PairArguments(*values)
    ctx.options = batch.ignore_index, token_logps.dtype, backend
    ctx.set_materialize_grads(False)
    ctx.mark_non_differentiable(*output[2:])
    ctx.save_for_backward(PairOutputs(*output).coefficients, batch.labels, batch.sequence_ids)


def _backward(
    ctx: Any, grad_loss: Tensor | None, grad_logps: Tensor | None, *_: None
) -> tuple[Tensor | None, ...]:
    for given in (grad_loss, grad_logps):
        check_no_tangent("the upstream gradient", given)
    grad = None
    if grad_loss is not None or grad_logps is not None:
        grad = pair_loss_backward_op(grad_loss, grad_logps, *ctx.saved_tensors, *ctx.options)
    return (grad, None, *(None,) * len(PairArguments._fields))


pair_loss_op.register_autograd(_backward, setup_context=_setup_context)


class _KeptLoss(torch.autograd.Function):
    """The operator with its derivative, for eager code, as in ``score_tokens.py``."""

    @staticmethod
    def forward(ctx: Any, *values: Any) -> Any:
        output = pair_loss_op(*values)
        _setup_context(ctx, values, output)
        return output

    backward = staticmethod(_backward)


def pair_loss_kept(*values: Any) -> Any:
    """Call the operator, and keep the tensors that its derivative needs."""
    requires_grad = values[0].requires_grad
    if requires_grad and torch.is_grad_enabled() and not torch.compiler.is_compiling():
        return _KeptLoss.apply(*values)
    return pair_loss_op(*values)


differentiate_once(pair_loss_backward_op)
