"""Kernels that run once per call: find, start and finish rows, and spread gradients.

They keep launches few: with a few hundred rows, a launch takes the host longer than the work takes
the device. One kernel replaces a dozen operators of PyTorch; the formulas are in
``fused/gradients.py`` and in the operators of ``ops/``. Letters: **M** positions, **N** of them
scored, **D** hidden size, **V** vocabulary.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch
import triton
import triton.language as tl

from realign_kernels.backends.kernel_set import FoundRows, StartedRows
from realign_kernels.backends.triton import launches
from realign_kernels.backends.triton.pairs import spread_gradient
from realign_kernels.backends.triton.transform import (
    DTYPES,
    log1p,
    narrow,
    rounded_numbers,
    slope_of,
    transform_numbers,
    transformed,
    widen,
)

if TYPE_CHECKING:
    from torch import Tensor

    from realign_kernels.head import Head, LogitTransform

__all__ = [
    "MOST_POSITIONS",
    "find_rows",
    "finish_rows",
    "grade_rows",
    "rescale_rows",
    "spread_gradient",
    "spread_rows",
    "start_rows",
]

# One program goes over all labels, some microseconds for a thousand; for more labels the operators
# of PyTorch, which use many programs, are faster.  Not measured.
MOST_POSITIONS = 1 << 15


@triton.jit(do_not_specialize=["num_positions", "vocabulary_size", "ignore_index", "num_rows"])
def _find_rows_kernel(
    labels_ptr, positions_ptr, scores_ptr, fits_ptr, count_ptr,
    num_positions, vocabulary_size, ignore_index, num_rows,
    BLOCK_M: tl.constexpr,
):  # fmt: skip
    """One program goes over the labels, and counts the scored ones on the way."""
    found = tl.zeros((), tl.int32)
    last = tl.zeros((), tl.int32)
    num_bad = tl.zeros((BLOCK_M,), tl.int32)
    for start in range(0, num_positions, BLOCK_M):
        offs_m = start + tl.arange(0, BLOCK_M)
        is_position = offs_m < num_positions
        labels = tl.load(labels_ptr + offs_m, mask=is_position, other=0)
        is_scored = is_position & (labels != ignore_index)
        is_bad = is_scored & ((labels < 0) | (labels >= vocabulary_size))
        num_bad += is_bad.to(tl.int32)
        places = found + tl.cumsum(is_scored.to(tl.int32), axis=0) - 1
        is_row = is_scored & (places < num_rows)
        tl.store(positions_ptr + places, offs_m.to(tl.int64), mask=is_row)
        tl.store(scores_ptr + offs_m, tl.zeros((BLOCK_M,), scores_ptr.dtype.element_ty),
                 mask=is_position)  # fmt: skip
        found += tl.sum(is_scored.to(tl.int32), axis=0)
        last = tl.maximum(last, tl.max(tl.where(is_scored, offs_m, 0), axis=0))
    # If there are fewer labels than stated, the remaining rows repeat the last one.
    for start in range(0, num_rows - found, BLOCK_M):
        places = found + start + tl.arange(0, BLOCK_M)
        repeated = tl.zeros((BLOCK_M,), tl.int64) + last
        tl.store(positions_ptr + places, repeated, mask=places < num_rows)
    tl.store(fits_ptr, tl.sum(num_bad, axis=0) == 0)
    tl.store(fits_ptr + 1, found == num_rows)
    if count_ptr is not None:
        tl.store(count_ptr, found)


@triton.jit(do_not_specialize=["num_rows", "total_rows", "inner_size", "vocabulary_size"])
def _start_rows_kernel(
    hidden_ptr, labels_ptr, positions_ptr, weight_ptr, bias_ptr, rows_ptr, ids_ptr, numbers_ptr,
    num_rows, total_rows, inner_size, vocabulary_size, hidden_size,
    stride_hb, stride_ht, stride_hd, stride_wv, stride_wd,
    inner: tl.float64, outer: tl.float64, inverse: tl.float64, linear: tl.float64,
    CAPS: tl.constexpr, STARTS_AT_LABEL: tl.constexpr, OPERAND: tl.constexpr,
    BLOCK_D: tl.constexpr,
):  # fmt: skip
    """One program owns a row: it gathers it, and starts its sums at the logit of its label."""
    n = tl.program_id(0).to(tl.int64)  # n * stride overflows int32, and so does token * stride
    dtype: tl.constexpr = numbers_ptr.dtype.element_ty
    is_row = n < num_rows  # other rows are padding
    position = tl.load(positions_ptr + n, mask=is_row, other=0)
    token = tl.load(labels_ptr + position, mask=is_row, other=-1)
    is_token = (token >= 0) & (token < vocabulary_size)
    row = tl.where(is_token, token, 0)
    source_ptr = hidden_ptr + position // inner_size * stride_hb + position % inner_size * stride_ht
    sums = tl.zeros((BLOCK_D,), dtype)
    # Bounds, since Triton 3.9's interpreter cannot combine a block's mask with a scalar condition.
    hidden_end = tl.where(is_row, hidden_size, 0)
    weight_end = tl.where(is_token, hidden_size, 0)
    for start in range(0, hidden_size, BLOCK_D):
        offs_d = start + tl.arange(0, BLOCK_D).to(tl.int64)
        mask = offs_d < hidden_size
        hidden = tl.load(source_ptr + offs_d * stride_hd, mask=offs_d < hidden_end, other=0.0)
        hidden = narrow(widen(hidden, dtype), OPERAND)
        if rows_ptr is not None:
            tl.store(rows_ptr + n * hidden_size + offs_d, hidden, mask=mask)
        if weight_ptr is not None:
            weight = tl.load(
                weight_ptr + row * stride_wv + offs_d * stride_wd,
                mask=offs_d < weight_end,
                other=0.0,
            )
            if weight.dtype != OPERAND:
                weight = narrow(widen(weight, dtype), OPERAND)
            sums += widen(hidden, dtype) * widen(weight, dtype)
    tl.store(ids_ptr + n, token)
    if weight_ptr is not None:
        z = tl.sum(sums, axis=0)
        if bias_ptr is not None:
            z += widen(tl.load(bias_ptr + row, mask=is_token, other=0.0), dtype)
        x = transformed(z, rounded_numbers(inner, outer, inverse, linear, dtype), CAPS)
        x = tl.where(is_token, x, float("nan"))
        tl.store(numbers_ptr + n, x)
        tl.store(numbers_ptr + total_rows + n, x if STARTS_AT_LABEL else -float("inf"))
        tl.store(numbers_ptr + 2 * total_rows + n, tl.zeros_like(x))


@triton.jit
def _shares(label_logit, shift, rest):
    """Return log p(label), the share of all other tokens, and the factor from E to shares.

    These are ``RowNumbers``, ``token_log_probs`` and ``logit_gradient`` of fused/gradients.py
    without a top token.
    """
    # Equal infinities, in a row without any finite logit, give NaN as they should.
    log_label = label_logit - tl.where(shift == -float("inf"), label_logit, shift)
    large = -log1p(rest * tl.exp(-log_label))
    logp = tl.where(log_label >= 0, large, log_label - tl.log(tl.exp(log_label) + rest))
    logp = tl.where(label_logit == float("inf"), float("nan"), logp)
    excess = tl.where(log_label <= 0, 0.0, log_label)  # NaN stays
    decay = tl.exp(-excess)
    total = tl.exp(log_label - excess) + decay * rest
    return logp, decay * rest / total, decay / total


@triton.jit(do_not_specialize=["total_rows", "vocabulary_size"])
def _finish_rows_kernel(
    numbers_ptr, positions_ptr, ids_ptr, weight_ptr, accumulator_ptr, scores_ptr,
    total_rows, vocabulary_size, hidden_size,
    stride_an, stride_wv, stride_wd,
    inner: tl.float64, outer: tl.float64, inverse: tl.float64, linear: tl.float64,
    CAPS: tl.constexpr, OPERAND: tl.constexpr, BLOCK_D: tl.constexpr,
):  # fmt: skip
    """One program owns a row: it stores the score, and its derivative in place of E @ W."""
    n = tl.program_id(0).to(tl.int64)
    label_logit = tl.load(numbers_ptr + n)
    shift = tl.load(numbers_ptr + total_rows + n)
    logp, at_label, of_rest = _shares(label_logit, shift, tl.load(numbers_ptr + 2 * total_rows + n))
    position = n
    if positions_ptr is not None:
        position = tl.load(positions_ptr + n)
    tl.store(scores_ptr + position, logp)
    if accumulator_ptr is not None:
        dtype: tl.constexpr = numbers_ptr.dtype.element_ty
        numbers = rounded_numbers(inner, outer, inverse, linear, dtype)
        token = tl.load(ids_ptr + n)
        is_token = (token >= 0) & (token < vocabulary_size)
        at_label = tl.where(is_token, at_label * slope_of(label_logit, numbers, CAPS), 0.0)
        row = tl.where(is_token, token, 0)
        weight_end = tl.where(is_token, hidden_size, 0)
        for start in range(0, hidden_size, BLOCK_D):
            offs_d = start + tl.arange(0, BLOCK_D).to(tl.int64)
            mask = offs_d < hidden_size
            pointers = accumulator_ptr + n * stride_an + offs_d
            weight = tl.load(
                weight_ptr + row * stride_wv + offs_d * stride_wd,
                mask=offs_d < weight_end,
                other=0.0,
            )
            if weight.dtype != OPERAND:
                weight = narrow(widen(weight, dtype), OPERAND)
            sums = tl.load(pointers, mask=mask, other=0.0)
            tl.store(pointers, at_label * widen(weight, dtype) - of_rest * sums, mask=mask)


@triton.jit(do_not_specialize=["num_rows"])
def _grade_rows_kernel(
    numbers_ptr, positions_ptr, upstream_ptr, scale_ptr, at_label_ptr,
    num_rows, stride_u,
    inner: tl.float64, outer: tl.float64, inverse: tl.float64, linear: tl.float64,
    CAPS: tl.constexpr, BLOCK_N: tl.constexpr,
):  # fmt: skip
    dtype: tl.constexpr = numbers_ptr.dtype.element_ty
    n = tl.program_id(0).to(tl.int64) * BLOCK_N + tl.arange(0, BLOCK_N)
    is_row = n < num_rows
    label_logit = tl.load(numbers_ptr + n, mask=is_row, other=0.0)
    shift = tl.load(numbers_ptr + num_rows + n, mask=is_row, other=0.0)
    rest = tl.load(numbers_ptr + 2 * num_rows + n, mask=is_row, other=0.0)
    _, at_label, of_rest = _shares(label_logit, shift, rest)
    position = n
    if positions_ptr is not None:
        position = tl.load(positions_ptr + n, mask=is_row, other=0)
    upstream = tl.load(upstream_ptr + position * stride_u, mask=is_row, other=0.0).to(dtype)
    slope = slope_of(label_logit, rounded_numbers(inner, outer, inverse, linear, dtype), CAPS)
    tl.store(scale_ptr + n, -upstream * of_rest, mask=is_row)
    tl.store(at_label_ptr + n, upstream * at_label * slope, mask=is_row)


@triton.jit
def _rescale_rows_kernel(
    matrix_ptr, old_shift_ptr, new_shift_ptr, num_columns, stride_mn, BLOCK_V: tl.constexpr
):  # fmt: skip
    """One program owns a row, which nearly always needs no change."""
    n = tl.program_id(0).to(tl.int64)
    old_shift, new_shift = tl.load(old_shift_ptr + n), tl.load(new_shift_ptr + n)
    if old_shift != new_shift:
        factor = tl.exp(old_shift - new_shift)
        for start in range(0, num_columns, BLOCK_V):
            offs_v = start + tl.arange(0, BLOCK_V)
            mask = offs_v < num_columns
            pointers = matrix_ptr + n * stride_mn + offs_v
            row = widen(tl.load(pointers, mask=mask, other=0.0), factor.dtype)
            tl.store(pointers, narrow(row * factor, matrix_ptr.dtype.element_ty), mask=mask)


@triton.jit(do_not_specialize=["num_rows"])
def _spread_rows_kernel(
    upstream_ptr, slopes_ptr, positions_ptr, out_ptr,
    num_rows, hidden_size,
    stride_u, stride_sn,
    BLOCK_D: tl.constexpr,
):  # fmt: skip
    """One program owns a position, and searches for it in the ascending scored positions."""
    m = tl.program_id(0).to(tl.int64)
    low = tl.zeros((), tl.int32)
    high = tl.full((), num_rows, tl.int32)
    while low < high:
        middle = (low + high) // 2
        is_below = tl.load(positions_ptr + middle) < m
        low = tl.where(is_below, middle + 1, low)
        high = tl.where(is_below, high, middle)
    position = tl.load(positions_ptr + low, mask=low < num_rows, other=-1)
    is_scored = position == m
    factor = tl.full((), 1.0, slopes_ptr.dtype.element_ty)
    if upstream_ptr is not None:
        factor = tl.load(upstream_ptr + m * stride_u, mask=is_scored, other=0.0).to(factor.dtype)
    slopes_end = tl.where(is_scored, hidden_size, 0)
    for start in range(0, hidden_size, BLOCK_D):
        offs_d = start + tl.arange(0, BLOCK_D).to(tl.int64)
        mask = offs_d < hidden_size
        slopes_at = slopes_ptr + low.to(tl.int64) * stride_sn + offs_d
        row = factor * tl.load(slopes_at, mask=offs_d < slopes_end, other=0.0)
        row = narrow(row, out_ptr.dtype.element_ty)
        tl.store(out_ptr + m * hidden_size + offs_d, row, mask=mask)


def find_rows(
    labels: Tensor,
    ignore_index: int,
    vocabulary_size: int,
    num_rows: int | None,
    dtype: torch.dtype,
) -> FoundRows:
    """Find the labels that are scored; the host waits for their number only if it is None."""
    size = len(labels)
    labels = labels.contiguous()
    positions = labels.new_empty(size if num_rows is None else num_rows)
    scores = labels.new_empty(size, dtype=dtype)
    fits = labels.new_empty(2, dtype=torch.bool)
    count = labels.new_empty((), dtype=torch.int32) if num_rows is None else None
    block, num_warps = launches.launch_of("find_rows", dtype, size, labels.device)
    _find_rows_kernel[(1,)](
        labels, positions, scores, fits, count,
        size, vocabulary_size, ignore_index, size if num_rows is None else num_rows,
        BLOCK_M=block,
        num_warps=num_warps,
    )  # fmt: skip
    if count is not None:
        return FoundRows(positions[: int(count)], scores, fits[0], None)
    return FoundRows(positions, scores, fits[0], fits[1])


def start_rows(
    head: Head,
    transform: LogitTransform,
    hidden_states: Tensor,
    labels: Tensor,
    positions: Tensor,
    total_rows: int,
    *,
    with_numbers: bool,
) -> StartedRows:
    """Gather rows and start their sums; except in float16, the shift is the label's logit."""
    weight, precision = head.weight, head.precision
    num_rows, hidden_size = len(positions), hidden_states.shape[-1]
    labels, positions = labels.contiguous(), positions.contiguous()
    bias = None if head.bias is None else head.bias.contiguous()
    if hidden_states.ndim == 2:
        hidden_states = hidden_states[None]
    elif hidden_states.ndim > 3:
        hidden_states = hidden_states.flatten(0, -3)
    is_whole = total_rows == num_rows == len(labels)
    hidden = None
    if is_whole and hidden_states.dtype == precision.operand and hidden_states.is_contiguous():
        hidden = hidden_states.view(total_rows, hidden_size)
    rows = hidden
    if rows is None:
        rows = hidden_states.new_empty(total_rows, hidden_size, dtype=precision.operand)
    ids = labels.new_empty(total_rows)
    numbers = rows.new_empty(3, total_rows, dtype=precision.accumulation)
    if total_rows > 0:
        block, num_warps = launches.launch_of("label_dot", numbers.dtype, hidden_size, ids.device)
        _start_rows_kernel[(total_rows,)](
            hidden_states, labels, positions, weight if with_numbers else None, bias,
            rows if hidden is None else None, ids, numbers,
            num_rows, total_rows, hidden_states.shape[1], len(weight), hidden_size,
            *hidden_states.stride(), *weight.stride(),
            STARTS_AT_LABEL=precision.operand != torch.float16,
            OPERAND=DTYPES[precision.operand],
            BLOCK_D=block,
            num_warps=num_warps,
            **transform_numbers(transform),
        )  # fmt: skip
    return StartedRows(rows, ids, numbers)


def finish_rows(
    head: Head,
    transform: LogitTransform,
    started: StartedRows,
    positions: Tensor | None,
    accumulator: Tensor | None,
    scores: Tensor,
) -> None:
    """Write the scores to their positions, and turn E @ W, if given, into their derivative."""
    weight, num_rows = head.weight, len(scores) if positions is None else len(positions)
    if num_rows == 0:
        return
    assert accumulator is None or launches.has_dense_rows(accumulator)
    hidden_size = weight.shape[1]
    block, num_warps = launches.launch_of("combine", scores.dtype, hidden_size, scores.device)
    _finish_rows_kernel[(num_rows,)](
        started.numbers, positions, started.ids, weight, accumulator, scores,
        started.numbers.shape[1], len(weight), hidden_size,
        0 if accumulator is None else accumulator.stride(0), *weight.stride(),
        OPERAND=DTYPES[head.precision.operand],
        BLOCK_D=block,
        num_warps=num_warps,
        **transform_numbers(transform),
    )  # fmt: skip


def grade_rows(
    transform: LogitTransform, numbers: Tensor, upstream: Tensor, positions: Tensor | None
) -> tuple[Tensor, Tensor]:
    """Return the gradient of the raw logits: the factor of E, and the entry at the label."""
    num_rows = numbers.shape[1]
    scale, at_label = numbers.new_empty(num_rows), numbers.new_empty(num_rows)
    if num_rows > 0:
        block, num_warps = launches.launch_of("label_dot", numbers.dtype, num_rows, scale.device)
        if positions is not None:  # hooks on saved tensors may return another layout
            positions = positions.contiguous()
        _grade_rows_kernel[(triton.cdiv(num_rows, block),)](
            numbers, positions, upstream, scale, at_label,
            num_rows, upstream.stride(0),
            BLOCK_N=block,
            num_warps=num_warps,
            **transform_numbers(transform),
        )  # fmt: skip
    return scale, at_label


def rescale_rows(matrix: Tensor, old_shift: Tensor, new_shift: Tensor) -> None:
    """Rescale rows of E from the old shift to the new one."""
    num_rows, num_columns = matrix.shape
    if num_rows == 0:
        return
    assert launches.has_dense_rows(matrix)
    block, num_warps = launches.launch_of("combine", new_shift.dtype, num_columns, matrix.device)
    _rescale_rows_kernel[(num_rows,)](
        matrix, old_shift, new_shift, num_columns, matrix.stride(0),
        BLOCK_V=block,
        num_warps=num_warps,
    )  # fmt: skip


def spread_rows(upstream: Tensor | None, rows: Tensor, positions: Tensor, out: Tensor) -> None:
    """Set a scored row of ``out`` to its row times its upstream gradient, any other to 0."""
    num_positions, hidden_size = out.shape
    if num_positions == 0 or hidden_size == 0:
        return
    if not launches.has_dense_rows(rows):  # hooks on saved tensors may return another layout
        rows = rows.contiguous()
    block, num_warps = launches.launch_of("combine", rows.dtype, hidden_size, out.device)
    _spread_rows_kernel[(num_positions,)](
        upstream, rows, positions.contiguous(), out,
        len(positions), hidden_size,
        0 if upstream is None else upstream.stride(0), rows.stride(0),
        BLOCK_D=block,
        num_warps=num_warps,
    )  # fmt: skip
