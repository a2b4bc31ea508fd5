"""``memory="tile"`` as an operator of torch: hidden states in, loss and its gradients out.

The forward computes gradients for an upstream gradient of 1, which the backward scales.  If
``logps`` has an upstream gradient too, they are not used: the logits are computed again and both
are propagated together, so that the result is rounded once.  Letters as in ``score_tokens.py``;
**P** pairs, **C** cells.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
from torch import Tensor

from realign_kernels.first_order import differentiate_once
from realign_kernels.ops.pair_loss import (
    PairArguments,
    PairOutputs,
    pair_loss_backward_op,
    pair_loss_fake,
    reduce_pairs,
)
from realign_kernels.ops.pair_tiles import TileArguments, score_and_differentiate
from realign_kernels.ops.schema import operator
from realign_kernels.ops.score_tokens import (
    HeadArguments,
    find_rows,
    fused_call,
    plain,
    score_tokens_backward_op,
)
from realign_kernels.sequences import check_counts, check_sequence_id_values
from realign_kernels.validation import check_chosen_present, check_no_tangent

# Operators cannot take lists of dtypes, so they take lists of indices into this tuple.
_DTYPES = (torch.float32, torch.float64, torch.float16, torch.bfloat16)


class TileOutputs(NamedTuple):
    """Outputs of the operator, in the order of its schema."""

    loss: Tensor  # as PairOutputs, down to coefficients
    logps: Tensor
    num_tokens: Tensor
    rewards: Tensor
    text_margins: Tensor
    image_margins: Tensor
    coefficients: Tensor
    grad_hidden: Tensor  # (M, D), or empty where not needed, like the other gradients
    grad_weight: Tensor
    grad_bias: Tensor
    grad_lora_a: Tensor
    grad_lora_b: Tensor
    positions: Tensor  # (N,)
    numbers: Tensor  # (3 or 4, N)
    top_ids: Tensor  # (N,)
    entropy: Tensor  # (M,), or empty where it was not asked for, like the next two
    mean_logits: Tensor
    is_top1: Tensor


_NUM_HEAD = len(HeadArguments._fields)
_NUM_BATCH = len(PairArguments._fields)
_NUM_LOSSES = len(PairOutputs._fields)


def _parts_of(values: tuple[Any, ...]) -> tuple[HeadArguments, PairArguments, TileArguments]:
    """Split the inputs of the operator into their three groups."""
    stop = _NUM_HEAD + _NUM_BATCH
    return (
        HeadArguments(*values[:_NUM_HEAD]),
        PairArguments(*values[_NUM_HEAD:stop]),
        TileArguments(*values[stop:]),
    )


@operator("rdpo_tiles", HeadArguments, PairArguments, TileArguments, returns=TileOutputs)
def rdpo_tiles_op(*values: Any) -> TileOutputs:
    """Reduce labels (M,) and hidden states (..., D) to a loss, and differentiate it."""
    head, batch, arguments = _parts_of(values)
    labels, sequence_ids, lengths = batch.labels, batch.sequence_ids, batch.sequence_lengths
    assert sequence_ids is not None
    with plain(head.hidden_states):
        vocabulary = head.vocabulary()
        is_scored = labels != batch.ignore_index
        check_sequence_id_values(sequence_ids, is_scored, batch.pairs.num_sequences)
        if lengths is not None:
            check_chosen_present(lengths)
            check_counts(_tokens_per_sequence(batch, sequence_ids), lengths)
        positions, _ = find_rows(
            head, vocabulary, labels, batch.ignore_index, lengths, arguments.label_shape
        )
        sums_head = any(arguments.needed[1:])
        call = fused_call(head, vocabulary, len(positions), sums_head_gradient=sums_head)
        if lengths is None or labels.device.type == "cpu":
            # Without lengths, the host waits for a GPU's counts.
            lengths = _tokens_per_sequence(batch, sequence_ids)
        result = score_and_differentiate(
            call,
            head,
            batch,
            arguments,
            positions,
            lengths.sum(dim=0).tolist(),
        )
        token_logps = result.token_logps
        if arguments.token_weights is not None:
            token_logps = token_logps * arguments.token_weights.to(token_logps.dtype)
        outputs, _ = reduce_pairs(token_logps, head.backend, batch, batch.objective)
        if batch.sequence_lengths is None and labels.device.type == "cpu":
            check_chosen_present(outputs.num_tokens)
        grads = (
            head.hidden_states.new_empty(0, dtype=call.accumulation) if grad is None else grad
            for grad in result.gradients
        )
        rows = (positions, result.numbers, result.top_ids)
        token_statistics = result.statistics or [token_logps.new_empty(0) for _ in range(3)]
        return TileOutputs._make((*outputs, *grads, *rows, *token_statistics))


def _tokens_per_sequence(batch: PairArguments, sequence_ids: Tensor) -> Tensor:
    """Count the answer tokens, (C, P), without those whose id is out of range."""
    size = batch.pairs.num_sequences
    is_scored = batch.labels != batch.ignore_index
    is_counted = is_scored & (sequence_ids >= 0) & (sequence_ids < size)
    ids = torch.where(is_counted, sequence_ids, size)
    # not bincount, whose size depends on the ids, so that the host would wait for a GPU
    counts = ids.new_zeros(size + 1).scatter_add_(0, ids, torch.ones_like(ids))
    return counts[:size].view(batch.pairs)


@rdpo_tiles_op.register_fake
def _rdpo_tiles_fake(*values: Any) -> TileOutputs:
    head, batch, arguments = _parts_of(values)
    number = head.precision().accumulation
    num_scored: Any = torch.library.get_ctx().new_dynamic_size()
    new = head.hidden_states.new_empty
    grads = (
        new(0, dtype=number)
        if tensor is None
        else tensor.new_empty(tensor.shape if is_needed else (0,), dtype=number)
        for tensor, is_needed in zip(head.tensors(), arguments.needed, strict=True)
    )
    losses = pair_loss_fake(new(0, dtype=number), head.backend, *batch)
    tracks_top = arguments.top_rows is not None or arguments.with_statistics
    rows = (
        new(num_scored, dtype=torch.int64),
        new((4 if tracks_top else 3, num_scored), dtype=number),
        new(num_scored if tracks_top else 0, dtype=torch.int64),
    )
    num_positions = batch.labels.shape[0] if arguments.with_statistics else 0
    token_statistics = (new(num_positions, dtype=number) for _ in range(3))
    return TileOutputs._make((*losses, *grads, *rows, *token_statistics))


class ScaleArguments(NamedTuple):
    """The upstream gradient, and the gradients for an upstream gradient of 1."""

    grad_loss: Tensor
    gradients: list[Tensor]
    dtypes: list[int]  # indices into _DTYPES
    witness: Tensor | None


@operator("scale_gradients", ScaleArguments, returns="Tensor[]")
def scale_gradients_op(*values: Any) -> list[Tensor]:
    """Return every gradient times the upstream gradient, rounded once."""
    given = ScaleArguments(*values)
    return [
        (gradient * given.grad_loss.to(gradient.dtype)).to(_DTYPES[dtype])
        for gradient, dtype in zip(given.gradients, given.dtypes, strict=True)
    ]


@scale_gradients_op.register_fake
def _scale_gradients_fake(*values: Any) -> list[Tensor]:
    given = ScaleArguments(*values)
    pairs = zip(given.gradients, given.dtypes, strict=True)
    return [torch.empty_like(gradient, dtype=_DTYPES[dtype]) for gradient, dtype in pairs]


def _setup_context(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, ...]) -> None:
    head, batch, arguments = _parts_of(inputs)
    outputs = TileOutputs(*output)
    ctx.options, ctx.needed = head[5:], arguments.needed
    ctx.spread = batch.ignore_index, outputs.loss.dtype, head.backend
    ctx.set_materialize_grads(False)
    ctx.mark_non_differentiable(*output[2:])
    ctx.save_for_backward(
        *head.tensors(), outputs.coefficients, batch.labels, batch.sequence_ids, arguments.top_rows,
        outputs.positions, outputs.numbers, outputs.top_ids,
        arguments.witness, arguments.token_weights,
        *output[_NUM_LOSSES : _NUM_LOSSES + len(head.tensors())],
    )  # fmt: skip


def _backward(
    ctx: Any, grad_loss: Tensor | None, grad_logps: Tensor | None, *_: None
) -> tuple[Tensor | None, ...]:
    for given in (grad_loss, grad_logps):
        check_no_tangent("the upstream gradient", given)
    # Read once: hooks of checkpointing and offloading unpack at every access.
    saved = ctx.saved_tensors
    *inputs, coefficients, labels, sequence_ids, top_rows, positions, numbers, top_ids = saved[:12]
    witness, token_weights, *gradients = saved[12:]
    total: Any = None
    if grad_logps is not None:
        grad_tokens = pair_loss_backward_op(
            grad_loss, grad_logps, coefficients, labels, sequence_ids, *ctx.spread
        )
        if token_weights is not None:
            grad_tokens = grad_tokens * token_weights.to(grad_tokens.dtype)
        stash = inputs[0].new_empty(0, inputs[1].shape[0])
        total = score_tokens_backward_op(
            *inputs, *ctx.options, grad_tokens, None, None, None, None,
            labels, top_rows, positions, numbers, top_ids, stash, ctx.needed,
        )  # fmt: skip
    elif grad_loss is not None:
        dtypes = [0 if tensor is None else _DTYPES.index(tensor.dtype) for tensor in inputs]
        total = scale_gradients_op(grad_loss, gradients, dtypes, witness)
    nothing = (None,) * (_NUM_HEAD + _NUM_BATCH + len(TileArguments._fields))
    if total is None:
        return nothing
    grads = zip(total, ctx.needed, strict=True)
    return (*(grad if is_needed else None for grad, is_needed in grads), *nothing[5:])


rdpo_tiles_op.register_autograd(_backward, setup_context=_setup_context)
differentiate_once(scale_gradients_op)
