"""The fused head as operators of torch: schemas, shapes under tracing, derivatives.

What an operator computes is in ``fused*.py``.  Rows are compacted inside: what is kept for a
backward has as many rows as labels are scored, a size that tracing does not know.  Letters: **M**
positions, **N** of them scored, **D** hidden size, **V** vocabulary of this shard, **r** rank.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager, nullcontext
from typing import Any

import torch
from torch import Tensor

from realign_kernels.backends.dispatch import kernels_of
from realign_kernels.first_order import differentiate_once
from realign_kernels.fused.forward import FusedCall, Keeps, gather_rows
from realign_kernels.fused.gradients import Needed, head_gradients
from realign_kernels.fused.results import FusedScores, score_rows
from realign_kernels.fused.scores import RowNumbers, by_scoring, logit_gradient
from realign_kernels.head import Head
from realign_kernels.options import LogitTransform, Precision
from realign_kernels.tiling import fused_tile_shape, spans
from realign_kernels.validation import check_labels, known_number, scored_positions
from realign_kernels.vocabulary import group_named, locate_shard

# Of a frozen head's gradient: the product is not rounded before both terms are in.
_ROWS_AT_A_TIME = 1024


@torch.library.custom_op("realign::score_tokens", mutates_args=())
def score_tokens_op(
    hidden_states: Tensor,
    lm_head_weight: Tensor,
    lm_head_bias: Tensor | None,
    lora_a: Tensor | None,
    lora_b: Tensor | None,
    labels: Tensor,
    top_rows: Tensor | None,
    lora_scaling: float,
    ignore_index: int,
    transform: list[float],
    autocast_dtype: torch.dtype | None,
    backend: str,
    keeps: str,
    with_statistics: bool,
    sequence_lengths: Tensor | None,
    budget: list[int],
    group_name: str | None,
    label_shape: list[int],
    witness: Tensor | None,
) -> tuple[
    Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor,
    Tensor,
]:  # fmt: skip
    """Score labels (M,) by hidden states (..., D); rows of ``top_rows`` by their best other token.

    ``transform`` is scale, softcap (0: none) and temperature, ``budget`` workspace and stash in
    bytes; ``sequence_lengths``, on the CPU, sums to the number of scored labels; ``label_shape`` is
    what callers index their labels by, for messages; ``witness`` is that of ``first_order.py``.
    """
    with plain(hidden_states):
        call = fused_call(
            hidden_states, lm_head_weight, lm_head_bias, lora_a, lora_b, lora_scaling, transform,
            autocast_dtype, backend, budget[0], group_name, sums_head_gradient=False,
        )  # fmt: skip
        check_labels(labels.view(label_shape), ignore_index, call.vocabulary)
        num_rows = known_number(sequence_lengths, labels.device)
        positions = scored_positions(labels != ignore_index, num_rows)
        kept = Keeps(keeps)
        needed = len(positions) * len(lm_head_weight) * call.operand.itemsize
        if kept is Keeps.STASH_IF_IT_FITS:
            kept = Keeps.STASH if needed <= budget[1] else Keeps.NUMBERS
        elif kept is Keeps.STASH and needed > budget[1]:
            raise ValueError(
                f"stash_bytes must be >= {needed} for memory='stash' with {len(positions)} answer "
                f"tokens and {len(lm_head_weight)} of vocabulary, got {budget[1]}. "
                "Raise it, or pass memory='auto'."
            )
        return score_rows(call, hidden_states, labels, positions, kept, top_rows, with_statistics)


@score_tokens_op.register_fake
def _score_tokens_fake(
    hidden_states: Tensor,
    lm_head_weight: Tensor,
    lm_head_bias: Tensor | None,
    lora_a: Tensor | None,
    lora_b: Tensor | None,
    labels: Tensor,
    top_rows: Tensor | None,
    lora_scaling: float,
    ignore_index: int,
    transform: list[float],
    autocast_dtype: torch.dtype | None,
    backend: str,
    keeps: str,
    with_statistics: bool,
    sequence_lengths: Tensor | None,
    budget: list[int],
    group_name: str | None,
    label_shape: list[int],
    witness: Tensor | None,
) -> tuple[Tensor, ...]:
    precision = _precision(lm_head_weight, autocast_dtype, backend)
    number, kept = precision.accumulation, Keeps(keeps)
    num_positions, hidden_size = labels.shape[0], hidden_states.shape[-1]
    tracks_top = with_statistics or top_rows is not None

    def empty(dtype: torch.dtype, is_there: bool, *shape: Any) -> Tensor:
        return hidden_states.new_empty(shape if is_there else (0,), dtype=dtype)

    def per_position(dtype: torch.dtype) -> Tensor:
        return empty(dtype, with_statistics, num_positions)

    num_scored: Any = 0
    num_stashed: Any = 0
    if kept is not Keeps.NOTHING:
        num_scored = torch.library.get_ctx().new_dynamic_size()
    if kept is Keeps.STASH:
        num_stashed = num_scored
    elif kept is Keeps.STASH_IF_IT_FITS:
        num_stashed = torch.library.get_ctx().new_dynamic_size()
    has_slopes = kept is Keeps.SLOPES
    return FusedScores(
        token_logps=empty(number, True, num_positions),
        top_non_label_logps=per_position(number),
        entropy=per_position(number),
        log_sum_sq_probs=per_position(number),
        mean_logits=per_position(number),
        is_top1=per_position(torch.bool),
        top_non_label_ids=per_position(torch.int64),
        slopes=empty(number, has_slopes, num_scored, hidden_size),
        top_slopes=empty(number, has_slopes and with_statistics, num_scored, hidden_size),
        positions=empty(torch.int64, True, num_scored),
        numbers=empty(number, True, 4 if tracks_top else 3, 0 if has_slopes else num_scored),
        top_ids=empty(torch.int64, True, num_scored if tracks_top and not has_slopes else 0),
        stash=empty(precision.operand, True, num_stashed, lm_head_weight.shape[0]),
    )


@torch.library.custom_op("realign::score_tokens_backward", mutates_args=())
def score_tokens_backward_op(
    grad_logps: Tensor | None,
    grad_top_logps: Tensor | None,
    hidden_states: Tensor,
    lm_head_weight: Tensor,
    lm_head_bias: Tensor | None,
    lora_a: Tensor | None,
    lora_b: Tensor | None,
    labels: Tensor,
    top_rows: Tensor | None,
    positions: Tensor,
    numbers: Tensor,
    top_ids: Tensor,
    stash: Tensor,
    lora_scaling: float,
    transform: list[float],
    autocast_dtype: torch.dtype | None,
    backend: str,
    budget: list[int],
    group_name: str | None,
    needed: list[bool],
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    """Return gradients of hidden states, weight, bias, A and B; empty where not needed."""
    with plain(hidden_states):
        call = fused_call(
            hidden_states, lm_head_weight, lm_head_bias, lora_a, lora_b, lora_scaling, transform,
            autocast_dtype, backend, budget[0], group_name, sums_head_gradient=any(needed[1:]),
        )  # fmt: skip
        rows = gather_rows(call, hidden_states, labels, positions)
        tracks_top = len(numbers) == 4
        # Hooks on saved tensors may hand them back in another layout.
        numbers, top_ids = numbers.contiguous(), top_ids.contiguous()
        row_numbers = RowNumbers(
            *numbers[:3], *((numbers[3], top_ids) if tracks_top else (None, None))
        )

        def per_row(grad: Tensor | None) -> Tensor:
            if grad is None or grad.numel() == 0:
                return numbers.new_zeros(len(positions))
            return grad[positions].to(numbers.dtype)

        grad_label, grad_top = per_row(grad_logps), None
        if tracks_top:
            grad_top = per_row(grad_top_logps)
        if top_rows is not None:
            grad_label, grad_top = by_scoring(top_rows[positions], grad_label)
        gradient = logit_gradient(row_numbers, call.transform, grad_label, grad_top)
        stashed = stash if len(stash) == len(positions) and len(positions) > 0 else None
        grads = head_gradients(call, rows, row_numbers, gradient, stashed, Needed(*needed))
        grad_hidden = None
        if grads.hidden is not None:
            grad_hidden = hidden_states.new_zeros(hidden_states.shape)
            rows_of_grad = grad_hidden.view(-1, hidden_states.shape[-1])
            rows_of_grad[positions] = grads.hidden.to(grad_hidden.dtype)
        given = (grad_hidden, grads.weight, grads.bias, grads.lora_a, grads.lora_b)
        inputs = (hidden_states, lm_head_weight, lm_head_bias, lora_a, lora_b)
        return tuple(  # type: ignore[return-value]
            hidden_states.new_empty(0) if grad is None or like is None else grad.to(like.dtype)
            for grad, like in zip(given, inputs, strict=True)
        )


@score_tokens_backward_op.register_fake
def _score_tokens_backward_fake(
    grad_logps: Tensor | None,
    grad_top_logps: Tensor | None,
    hidden_states: Tensor,
    lm_head_weight: Tensor,
    lm_head_bias: Tensor | None,
    lora_a: Tensor | None,
    lora_b: Tensor | None,
    labels: Tensor,
    top_rows: Tensor | None,
    positions: Tensor,
    numbers: Tensor,
    top_ids: Tensor,
    stash: Tensor,
    lora_scaling: float,
    transform: list[float],
    autocast_dtype: torch.dtype | None,
    backend: str,
    budget: list[int],
    group_name: str | None,
    needed: list[bool],
) -> tuple[Tensor, ...]:
    inputs = (hidden_states, lm_head_weight, lm_head_bias, lora_a, lora_b)
    return tuple(
        hidden_states.new_empty(0)
        if like is None or not is_needed
        else torch.empty_like(like, memory_format=torch.contiguous_format)
        for like, is_needed in zip(inputs, needed, strict=True)
    )


@torch.library.custom_op("realign::scale_slopes", mutates_args=())
def scale_slopes_op(
    grad_logps: Tensor | None,
    grad_top_logps: Tensor | None,
    slopes: Tensor,
    top_slopes: Tensor,
    positions: Tensor,
    shape: list[int],
    dtype: torch.dtype,
    witness: Tensor | None,
) -> Tensor:
    """Return the gradient by hidden states from derivatives that the forward has taken.

    An operator of its own, whose derivative is refused: it would be wrong in silence.
    """
    grad = torch.zeros(shape, dtype=dtype, device=slopes.device)
    rows_of_grad = grad.view(-1, shape[-1])
    terms = [
        (upstream[positions][:, None], slope)
        for upstream, slope in ((grad_logps, slopes), (grad_top_logps, top_slopes))
        if upstream is not None and slope.numel() > 0
    ]
    for block in spans(len(positions) if terms else 0, _ROWS_AT_A_TIME):
        upstream, slope = terms[0]
        rows = upstream[block] * slope[block]
        for upstream, slope in terms[1:]:
            rows.addcmul_(upstream[block], slope[block])
        rows_of_grad[positions[block]] = rows.to(dtype)
        del rows
    return grad


@scale_slopes_op.register_fake
def _scale_slopes_fake(
    grad_logps: Tensor | None,
    grad_top_logps: Tensor | None,
    slopes: Tensor,
    top_slopes: Tensor,
    positions: Tensor,
    shape: list[int],
    dtype: torch.dtype,
    witness: Tensor | None,
) -> Tensor:
    return slopes.new_empty(shape, dtype=dtype)


@contextmanager
def plain(tensor: Tensor) -> Iterator[None]:
    """Run below autograd and autocast: what is rounded, and where, is explicit."""
    # Triton launches on the current device, which need not be that of the tensors.
    device = torch.cuda.device_of(tensor) if tensor.is_cuda else nullcontext()
    with device, torch.no_grad(), torch.autocast(tensor.device.type, enabled=False):
        yield


def fused_call(
    hidden_states: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    lora_a: Tensor | None,
    lora_b: Tensor | None,
    lora_scaling: float,
    transform: list[float],
    autocast_dtype: torch.dtype | None,
    backend: str,
    workspace_bytes: int,
    group_name: str | None,
    *,
    sums_head_gradient: bool,
) -> FusedCall:
    """Gather what does not change over a call; ``sums_head_gradient`` takes room from its tiles."""
    precision = _precision(weight, autocast_dtype, backend)
    shape = fused_tile_shape(
        hidden_states.device.type,
        weight.shape[1],
        0 if lora_a is None else lora_a.shape[0],
        (precision.accumulation.itemsize, precision.operand.itemsize),
        workspace_bytes,
        casts_head=precision.copies(weight.dtype),
        sums_head_gradient=sums_head_gradient,
    )
    scale, softcap, temperature = transform
    factor = None if lora_a is None else precision.of_factor(lora_a)
    return FusedCall(
        head=Head(weight, bias, factor, lora_b, lora_scaling, precision),
        transform=LogitTransform(scale, softcap or None, temperature),
        vocabulary=locate_shard(weight.shape[0], group_named(group_name), weight.device),
        shape=shape,
        kernels=kernels_of(backend),
    )


def _precision(weight: Tensor, autocast_dtype: torch.dtype | None, backend: str) -> Precision:
    """Return the dtypes: products of half operands are exact on GPUs and slow on CPUs."""
    computed_in = torch.float64 if weight.dtype == torch.float64 else torch.float32
    operand = computed_in if backend == "cpu" else autocast_dtype or weight.dtype
    return Precision(autocast_dtype, computed_in, operand)


def _setup_context(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, ...]) -> None:
    (
        hidden_states, weight, bias, lora_a, lora_b, labels, top_rows, lora_scaling, _, transform,
        autocast_dtype, backend, keeps, _, _, budget, group_name, _, witness,
    ) = inputs  # fmt: skip
    scores = FusedScores(*output)
    ctx.keeps = Keeps(keeps)
    ctx.hidden_dtype = hidden_states.dtype
    ctx.options = (lora_scaling, transform, autocast_dtype, backend, budget, group_name)
    ctx.set_materialize_grads(False)
    ctx.mark_non_differentiable(*output[2:])
    if ctx.keeps is Keeps.SLOPES:
        ctx.save_for_backward(scores.slopes, scores.top_slopes, scores.positions, witness)
        ctx.hidden_shape = list(hidden_states.shape)
    else:
        ctx.save_for_backward(
            hidden_states, weight, bias, lora_a, lora_b, labels, top_rows, scores.positions,
            scores.numbers, scores.top_ids, scores.stash,
        )  # fmt: skip


def _backward(
    ctx: Any, grad_logps: Tensor | None, grad_top_logps: Tensor | None = None, *_: None
) -> tuple[Tensor | None, ...]:
    none = (None,) * 14
    if grad_logps is None and grad_top_logps is None:
        return (None,) * 5 + none
    needed = list(ctx.needs_input_grad[:5])
    if ctx.keeps is Keeps.SLOPES:
        slopes, top_slopes, positions, witness = ctx.saved_tensors
        grad = scale_slopes_op(
            grad_logps,
            grad_top_logps,
            slopes,
            top_slopes,
            positions,
            ctx.hidden_shape,
            ctx.hidden_dtype,
            witness,
        )
        return (grad, None, None, None, None, *none)
    lora_scaling, transform, autocast_dtype, backend, budget, group_name = ctx.options
    grads = score_tokens_backward_op(
        grad_logps, grad_top_logps, *ctx.saved_tensors, lora_scaling, transform, autocast_dtype,
        backend, budget, group_name, needed,
    )  # fmt: skip
    return (
        *(grad if is_needed else None for grad, is_needed in zip(grads, needed, strict=True)),
        *none,
    )


score_tokens_op.register_autograd(_backward, setup_context=_setup_context)


for _operator in (score_tokens_backward_op, scale_slopes_op):
    differentiate_once(_operator)
