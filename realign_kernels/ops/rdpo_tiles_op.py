"""``memory="tile"`` as an operator of torch: hidden states in, loss and its gradients out.

Gradients are those of a loss of slope 1, which the backward scales.  A gradient that comes through
``logps`` is added by computing the logits again.  Letters as in ``ops.py``; **P** pairs, **C**
cells.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
from torch import Tensor

from realign_kernels.first_order import differentiate_once
from realign_kernels.fused.gradients import Needed
from realign_kernels.objective import Objective
from realign_kernels.ops.pair_loss_op import reduce_pairs, rows_of_table
from realign_kernels.ops.pair_tiles import TiledBatch, score_and_differentiate
from realign_kernels.ops.score_tokens_op import fused_call, plain, score_tokens_backward_op
from realign_kernels.sequences import PairShape, check_counts, check_sequence_id_values
from realign_kernels.validation import (
    check_chosen_present,
    check_labels,
    known_number,
    scored_positions,
)

# Operators take no lists of dtypes, but of numbers.
_DTYPES = (torch.float32, torch.float64, torch.float16, torch.bfloat16)


class TileOutputs(NamedTuple):
    """Outputs of the operator, in the order of its schema."""

    loss: Tensor  # as PairOutputs, down to image_margins
    logps: Tensor
    num_tokens: Tensor
    rewards: Tensor
    text_margins: Tensor
    image_margins: Tensor
    grad_hidden: Tensor  # (M, D), or empty where not needed, as are the others
    grad_weight: Tensor
    grad_bias: Tensor
    grad_lora_a: Tensor
    grad_lora_b: Tensor
    positions: Tensor  # (N,)
    numbers: Tensor  # (3 or 4, N)
    top_ids: Tensor  # (N,)


@torch.library.custom_op("realign::rdpo_tiles", mutates_args=())
def rdpo_tiles_op(
    hidden_states: Tensor,
    lm_head_weight: Tensor,
    lm_head_bias: Tensor | None,
    lora_a: Tensor | None,
    lora_b: Tensor | None,
    labels: Tensor,
    sequence_ids: Tensor,
    top_rows: Tensor | None,
    sequence_lengths: Tensor | None,
    ref_logps: Tensor | None,
    lora_scaling: float,
    ignore_index: int,
    transform: list[float],
    autocast_dtype: torch.dtype | None,
    backend: str,
    budget: list[int],
    group_name: str | None,
    pair_shape: list[int],
    terms: list[float],
    nll_weight: float,
    needed: list[bool],
    label_shape: list[int],
    witness: Tensor | None,
) -> tuple[
    Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor,
    Tensor, Tensor,
]:  # fmt: skip
    """Reduce labels (M,) and hidden states (M, D) to a loss, and differentiate it."""
    with plain(hidden_states):
        call = fused_call(
            hidden_states, lm_head_weight, lm_head_bias, lora_a, lora_b, lora_scaling, transform,
            autocast_dtype, backend, budget[0], group_name, sums_head_gradient=any(needed[1:]),
        )  # fmt: skip
        check_labels(labels.view(label_shape), ignore_index, call.vocabulary)
        pairs = PairShape(*pair_shape)
        is_scored = labels != ignore_index
        check_sequence_id_values(sequence_ids, is_scored, pairs.num_sequences)
        if sequence_lengths is not None:
            check_chosen_present(sequence_lengths)
            check_counts(
                _tokens_per_sequence(labels, sequence_ids, ignore_index, pairs), sequence_lengths
            )
        positions = scored_positions(is_scored, known_number(sequence_lengths, labels.device))
        batch = TiledBatch(
            hidden_states, labels, sequence_ids, top_rows, ref_logps, ignore_index, pairs,
            Objective.from_table(rows_of_table(terms), nll_weight),
        )  # fmt: skip
        result = score_and_differentiate(
            call,
            batch,
            positions,
            _tokens_per_pair(batch, sequence_lengths),
            Needed(*needed),
            budget[1],
            backend,
        )
        outputs = reduce_pairs(
            result.token_logps, labels, sequence_ids, ref_logps, ignore_index, pairs,
            batch.objective, backend,
        )  # fmt: skip
        if sequence_lengths is None and labels.device.type == "cpu":
            check_chosen_present(outputs.num_tokens)
        wide = call.accumulation
        grads = (
            hidden_states.new_empty(0, dtype=wide) if grad is None else grad
            for grad in result.gradients
        )
        rows = (positions, result.numbers, result.top_ids)
        return TileOutputs._make((*outputs[:6], *grads, *rows))


def _tokens_per_sequence(
    labels: Tensor, sequence_ids: Tensor, ignore_index: int, pairs: PairShape
) -> Tensor:
    """Count the answer tokens, (C, P); ids that are none are left out."""
    size = pairs.num_sequences
    is_counted = (labels != ignore_index) & (sequence_ids >= 0) & (sequence_ids < size)
    ids = torch.where(is_counted, sequence_ids, size)
    # not bincount, whose size depends on the ids: a GPU's host waits for them
    counts = ids.new_zeros(size + 1).scatter_add_(0, ids, torch.ones_like(ids))
    return counts[:size].view(pairs)


def _tokens_per_pair(batch: TiledBatch, sequence_lengths: Tensor | None) -> list[int]:
    """Return the answer tokens of every pair, on the host; a GPU's waits if it was not told."""
    if sequence_lengths is None or batch.labels.device.type == "cpu":
        sequence_lengths = _tokens_per_sequence(
            batch.labels, batch.sequence_ids, batch.ignore_index, batch.pairs
        )
    counts: list[int] = sequence_lengths.sum(dim=0).tolist()
    return counts


@rdpo_tiles_op.register_fake
def _rdpo_tiles_fake(
    hidden_states: Tensor,
    lm_head_weight: Tensor,
    lm_head_bias: Tensor | None,
    lora_a: Tensor | None,
    lora_b: Tensor | None,
    labels: Tensor,
    sequence_ids: Tensor,
    top_rows: Tensor | None,
    sequence_lengths: Tensor | None,
    ref_logps: Tensor | None,
    lora_scaling: float,
    ignore_index: int,
    transform: list[float],
    autocast_dtype: torch.dtype | None,
    backend: str,
    budget: list[int],
    group_name: str | None,
    pair_shape: list[int],
    terms: list[float],
    nll_weight: float,
    needed: list[bool],
    label_shape: list[int],
    witness: Tensor | None,
) -> tuple[Tensor, ...]:
    number = torch.float64 if lm_head_weight.dtype == torch.float64 else torch.float32
    num_scored: Any = torch.library.get_ctx().new_dynamic_size()
    inputs = (hidden_states, lm_head_weight, lm_head_bias, lora_a, lora_b)
    grads = (
        hidden_states.new_empty(0, dtype=number)
        if tensor is None
        else tensor.new_empty(tensor.shape if is_needed else (0,), dtype=number)
        for tensor, is_needed in zip(inputs, needed, strict=True)
    )
    new = hidden_states.new_empty
    losses = (
        new((), dtype=number),
        new(pair_shape, dtype=number),
        new(pair_shape, dtype=torch.int64),
        new(pair_shape, dtype=number),
        new(pair_shape[1], dtype=number),
        new(pair_shape[1], dtype=number),
    )
    rows = (
        new(num_scored, dtype=torch.int64),
        new((3 if top_rows is None else 4, num_scored), dtype=number),
        new(0 if top_rows is None else num_scored, dtype=torch.int64),
    )
    return TileOutputs._make((*losses, *grads, *rows))


@torch.library.custom_op("realign::scale_gradients", mutates_args=())
def scale_gradients_op(
    grad_loss: Tensor, gradients: list[Tensor], dtypes: list[int], witness: Tensor | None
) -> list[Tensor]:
    """Return every gradient times the slope from above, rounded once, to ``_DTYPES[dtypes]``."""
    scaled = zip(gradients, dtypes, strict=True)
    return [
        (gradient * grad_loss.to(gradient.dtype)).to(_DTYPES[dtype]) for gradient, dtype in scaled
    ]


@scale_gradients_op.register_fake
def _scale_gradients_fake(
    grad_loss: Tensor, gradients: list[Tensor], dtypes: list[int], witness: Tensor | None
) -> list[Tensor]:
    pairs = zip(gradients, dtypes, strict=True)
    return [torch.empty_like(gradient, dtype=_DTYPES[dtype]) for gradient, dtype in pairs]


def _dtypes_of(inputs: list[Tensor | None]) -> list[int]:
    return [0 if tensor is None else _DTYPES.index(tensor.dtype) for tensor in inputs]


def _setup_context(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, ...]) -> None:
    (
        hidden_states, weight, bias, lora_a, lora_b, labels, sequence_ids, top_rows, _, _,
        lora_scaling, ignore_index, transform, autocast_dtype, backend, budget, group_name, _, _,
        _, needed, _, witness,
    ) = inputs  # fmt: skip
    outputs = TileOutputs(*output)
    ctx.options = (lora_scaling, transform, autocast_dtype, backend, budget, group_name, needed)
    ctx.ignore_index = ignore_index
    ctx.set_materialize_grads(False)
    ctx.mark_non_differentiable(*output[2:])
    ctx.save_for_backward(
        hidden_states, weight, bias, lora_a, lora_b, labels, sequence_ids, top_rows,
        outputs.positions, outputs.numbers, outputs.top_ids, witness, *output[6:11],
    )  # fmt: skip


def _backward(
    ctx: Any, grad_loss: Tensor | None, grad_logps: Tensor | None, *_: None
) -> tuple[Tensor | None, ...]:
    # Read once: hooks of checkpointing and offloading unpack at every access.
    saved = ctx.saved_tensors
    *inputs, labels, sequence_ids, top_rows, positions, numbers, top_ids, witness = saved[:12]
    needed = ctx.options[-1]
    total: list[Tensor] | None = None
    if grad_loss is not None:
        total = scale_gradients_op(grad_loss, list(saved[12:]), _dtypes_of(inputs), witness)
    if grad_logps is not None:
        is_scored = labels != ctx.ignore_index
        grad_tokens = grad_logps.new_zeros(labels.shape)
        if grad_logps.numel() > 0:
            grad_tokens = grad_logps.reshape(-1)[torch.where(is_scored, sequence_ids, 0)]
        stash = inputs[0].new_empty(0, inputs[1].shape[0])
        more = score_tokens_backward_op(
            torch.where(is_scored, grad_tokens, 0.0), None, *inputs, labels, top_rows, positions,
            numbers, top_ids, stash, *ctx.options,
        )  # fmt: skip
        total = [a + b for a, b in zip(total, more, strict=True)] if total else list(more)
    none = (None,) * 18
    if total is None:
        return (None,) * 5 + none
    grads = zip(total, needed, strict=True)
    return (*(grad if is_needed else None for grad, is_needed in grads), *none)


rdpo_tiles_op.register_autograd(_backward, setup_context=_setup_context)
differentiate_once(scale_gradients_op)
