"""The epilogue: work on a tile of logits between the product that makes it and the next product.

One program owns a row and goes over the tile's columns in blocks.  Where exponentials are not
written in place of the logits, it goes over them once: it sums with the current shift and finds the
largest logit on the way; only if that lies too far above the shift does it start again.  Where they
replace the logits, or the top token must be known before anything is summed, the largest logit is
found first.
"""

from __future__ import annotations

import math
from typing import TYPE_CHECKING

import triton
import triton.language as tl

from realign_kernels.backends.triton import launches
from realign_kernels.backends.triton.transform import (
    rounded_numbers,
    slope_of,
    transform_numbers,
    transformed,
)

if TYPE_CHECKING:
    from realign_kernels.backends.kernel_set import Tile


@triton.jit
def _load_transformed(logits_ptr, bias_ptr, offs_v, num_columns, numbers, CAPS: tl.constexpr):
    """Return x of a block; values past the tile are no logits and must be masked."""
    is_column = offs_v < num_columns
    z = tl.load(logits_ptr + offs_v, mask=is_column, other=0.0)
    if bias_ptr is not None:
        z += tl.load(bias_ptr + offs_v, mask=is_column, other=0.0)
    return transformed(z, numbers, CAPS)


@triton.jit
def _survey(
    logits_ptr, bias_ptr, label, num_columns, numbers, CAPS: tl.constexpr, BLOCK_V: tl.constexpr
):  # fmt: skip
    """Return the largest x except the label's, its first column, the sum of x, the label's x."""
    dtype: tl.constexpr = logits_ptr.dtype.element_ty
    largest = tl.full((BLOCK_V,), -float("inf"), dtype)
    columns = tl.zeros((BLOCK_V,), tl.int32)
    totals = tl.zeros((BLOCK_V,), dtype)
    label_logits = tl.zeros((BLOCK_V,), dtype)
    for start in range(0, num_columns, BLOCK_V):
        offs_v = start + tl.arange(0, BLOCK_V)
        x = _load_transformed(logits_ptr, bias_ptr, offs_v, num_columns, numbers, CAPS)
        is_column = offs_v < num_columns
        is_label = offs_v == label
        totals += tl.where(is_column, x, 0.0)
        label_logits += tl.where(is_label, x, 0.0)
        # NaN never wins a comparison; it reaches the sums through exp instead.
        is_larger = is_column & (offs_v != label) & (x > largest)
        largest = tl.where(is_larger, x, largest)
        columns = tl.where(is_larger, offs_v, columns)
    top = tl.max(largest, axis=0)
    column = tl.min(tl.where(largest == top, columns, num_columns), axis=0)
    return top, column, tl.sum(totals, axis=0), tl.sum(label_logits, axis=0)


@triton.jit
def _exponentiate(
    logits_ptr, exponentials_ptr, bias_ptr, shift, label, own_top, top_entry, num_columns,
    numbers, CAPS: tl.constexpr, BLOCK_V: tl.constexpr,
):  # fmt: skip
    """Write E of a row; return its largest x except the label's, and sums of e, -e log e, e ** 2.

    The columns ``label`` and ``own_top`` are in no sum; their entries are 0 and ``top_entry``.
    """
    dtype: tl.constexpr = logits_ptr.dtype.element_ty
    largest = tl.full((BLOCK_V,), -float("inf"), dtype)
    sums = tl.zeros((BLOCK_V,), dtype)
    entropy_sums = tl.zeros((BLOCK_V,), dtype)
    square_sums = tl.zeros((BLOCK_V,), dtype)
    # If all x so far are -inf, every exponential is 0; -inf - -inf would give NaN.
    finite_shift = tl.where(shift == -float("inf"), 0.0, shift)
    for start in range(0, num_columns, BLOCK_V):
        offs_v = start + tl.arange(0, BLOCK_V)
        x = _load_transformed(logits_ptr, bias_ptr, offs_v, num_columns, numbers, CAPS)
        is_column = offs_v < num_columns
        is_counted = is_column & (offs_v != label) & (offs_v != own_top)
        largest = tl.where(is_counted & (x > largest), x, largest)
        log_e = tl.where(is_counted, x - finite_shift, -float("inf"))
        e = tl.exp(log_e)
        sums += e
        entropy_sums += tl.where(e == 0, 0.0, -e * log_e)
        square_sums += e * e
        if exponentials_ptr is not None:
            entry = e * slope_of(x, numbers, CAPS)
            # Selected, since a slope may be infinite, and 0 * inf is NaN.
            entry = tl.where(is_counted, entry, tl.where(offs_v == own_top, top_entry, 0.0))
            out_dtype: tl.constexpr = exponentials_ptr.dtype.element_ty
            tl.store(exponentials_ptr + offs_v, entry.to(out_dtype), mask=is_column)
    rest_sum, entropy_sum = tl.sum(sums, axis=0), tl.sum(entropy_sums, axis=0)
    return tl.max(largest, axis=0), rest_sum, entropy_sum, tl.sum(square_sums, axis=0)


@triton.jit
def _column_of(token, first_column, num_columns):
    """Return a token's column in the tile, or -1; int32, since every column is compared to it."""
    column = token - first_column
    return tl.where((column >= 0) & (column < num_columns), column, -1).to(tl.int32)


@triton.jit
def _scale_row(row_ptr, num_columns, factor, BLOCK: tl.constexpr):
    for start in range(0, num_columns, BLOCK):
        offs = start + tl.arange(0, BLOCK)
        row = tl.load(row_ptr + offs, mask=offs < num_columns, other=0.0)
        tl.store(row_ptr + offs, row * factor, mask=offs < num_columns)


@triton.jit
def _epilogue_kernel(
    logits_ptr, exponentials_ptr, bias_ptr, labels_ptr, tile_shift_ptr,
    accumulator_ptr, low_rank_ptr,
    shift_ptr, rest_sum_ptr, logit_sum_ptr, label_logits_ptr, entropy_sum_ptr, square_sum_ptr,
    top_logits_ptr, top_ids_ptr, released_ids_ptr, released_values_ptr,
    first_column, num_columns, hidden_size, rank,
    stride_ln, stride_en, stride_an, stride_rn,
    bound: tl.float64, inner: tl.float64, outer: tl.float64, inverse: tl.float64,
    linear: tl.float64,
    CAPS: tl.constexpr, FINDS_TOP_FIRST: tl.constexpr, HAS_STATISTICS: tl.constexpr,
    TRACKS_TOP: tl.constexpr, BLOCK_V: tl.constexpr,
):  # fmt: skip
    """Fold one row of a tile into its sums."""
    n = tl.program_id(0).to(tl.int64)  # n * stride overflows int32
    numbers = rounded_numbers(inner, outer, inverse, linear, logits_ptr.dtype.element_ty)
    logits_ptr += n * stride_ln
    if exponentials_ptr is not None:
        exponentials_ptr += n * stride_en
    label = _column_of(tl.load(labels_ptr + n), first_column, num_columns)
    shift = tl.load(shift_ptr + n)
    rest_sum = tl.load(rest_sum_ptr + n)
    own_top = tl.full((), -1, tl.int32)
    top_entry = tl.zeros_like(shift)
    entropy_sum, square_sum = tl.zeros_like(shift), tl.zeros_like(shift)
    if FINDS_TOP_FIRST:
        top, column, total, label_logit = _survey(
            logits_ptr, bias_ptr, label, num_columns, numbers, CAPS, BLOCK_V
        )
        added, added_entropy, added_square = top_entry, top_entry, top_entry
    else:
        top, added, added_entropy, added_square = _exponentiate(
            logits_ptr, exponentials_ptr, bias_ptr, shift, label, own_top, top_entry, num_columns,
            numbers, CAPS, BLOCK_V,
        )  # fmt: skip
    if HAS_STATISTICS:
        entropy_sum, square_sum = tl.load(entropy_sum_ptr + n), tl.load(square_sum_ptr + n)
        tl.store(logit_sum_ptr + n, tl.load(logit_sum_ptr + n) + total)
        if label >= 0:
            tl.store(label_logits_ptr + n, label_logit)

    # The second condition is the start of a row whose label has probability 0.
    is_far = (top - shift > tl.full((), bound, shift.dtype)) | (shift == -float("inf"))
    if is_far & (top != -float("inf")):
        log_decay = shift - top
        decay = tl.exp(log_decay)
        # -(a e) log(a e) = a (-e log e) - a log(a) e
        entropy_sum = tl.where(decay == 0, 0.0, decay * (entropy_sum - log_decay * rest_sum))
        square_sum *= decay * decay
        rest_sum *= decay
        shift = top
        if accumulator_ptr is not None:
            _scale_row(accumulator_ptr + n * stride_an, hidden_size, decay, BLOCK_V)
        if low_rank_ptr is not None:
            _scale_row(low_rank_ptr + n * stride_rn, rank, decay, BLOCK_V)
        if not FINDS_TOP_FIRST:
            tl.debug_barrier()  # the same addresses are stored again
            top, added, added_entropy, added_square = _exponentiate(
                logits_ptr, exponentials_ptr, bias_ptr, shift, label, own_top, top_entry,
                num_columns, numbers, CAPS, BLOCK_V,
            )  # fmt: skip

    if TRACKS_TOP:
        old_top, old_id = tl.load(top_logits_ptr + n), tl.load(top_ids_ptr + n)
        is_new = top > old_top
        own_top = tl.where(is_new, column, -1)
        # The old top token joins the sums.
        is_released = is_new & (old_top > -float("inf"))
        log_e = tl.where(is_released, old_top - shift, -float("inf"))
        e = tl.exp(log_e)
        rest_sum += e
        entropy_sum += tl.where(e == 0, 0.0, -e * log_e)
        square_sum += e * e
        tl.store(top_logits_ptr + n, tl.where(is_new, top, old_top))
        tl.store(top_ids_ptr + n, tl.where(is_new, first_column + column, old_id))
        if released_ids_ptr is not None:
            value = tl.where(is_released, e * slope_of(old_top, numbers, CAPS), 0.0)
            tl.store(released_ids_ptr + n, tl.where(is_released, old_id, -1))
            tl.store(released_values_ptr + n, value)
        else:
            # A stash keeps the entry, and drops that of the last top token at the end; an
            # accumulator gets an entry when its token is released.
            top_entry = tl.exp(top - shift) * slope_of(top, numbers, CAPS)
    if FINDS_TOP_FIRST:
        tl.debug_barrier()  # exponentials may replace logits that the survey has read
        top, added, added_entropy, added_square = _exponentiate(
            logits_ptr, exponentials_ptr, bias_ptr, shift, label, own_top, top_entry, num_columns,
            numbers, CAPS, BLOCK_V,
        )  # fmt: skip
    tl.store(shift_ptr + n, shift)
    tl.store(rest_sum_ptr + n, rest_sum + added)
    if HAS_STATISTICS:
        tl.store(entropy_sum_ptr + n, entropy_sum + added_entropy)
        tl.store(square_sum_ptr + n, square_sum + added_square)
    if tile_shift_ptr is not None:
        tl.store(tile_shift_ptr + n, shift)


@triton.jit
def _replay_kernel(
    logits_ptr, exponentials_ptr, bias_ptr, labels_ptr, shift_ptr, top_ids_ptr,
    first_column, num_columns,
    stride_ln, stride_en,
    inner: tl.float64, outer: tl.float64, inverse: tl.float64, linear: tl.float64,
    CAPS: tl.constexpr, BLOCK_V: tl.constexpr,
):  # fmt: skip
    """Write E of one row again, relative to its final shift, and sum nothing."""
    n = tl.program_id(0).to(tl.int64)
    numbers = rounded_numbers(inner, outer, inverse, linear, logits_ptr.dtype.element_ty)
    shift = tl.load(shift_ptr + n)
    label = _column_of(tl.load(labels_ptr + n), first_column, num_columns)
    top = tl.full((), -1, tl.int32)
    if top_ids_ptr is not None:
        top = _column_of(tl.load(top_ids_ptr + n), first_column, num_columns)
    _exponentiate(
        logits_ptr + n * stride_ln, exponentials_ptr + n * stride_en, bias_ptr, shift, label, top,
        tl.zeros_like(shift), num_columns,
        numbers, CAPS, BLOCK_V,
    )  # fmt: skip


def epilogue(tile: Tile) -> None:
    """Fold a tile of logits into the sums of its rows."""
    logits, exponentials, state = tile.logits, tile.exponentials, tile.state
    num_rows, num_columns = logits.shape
    if num_rows == 0:
        return
    assert launches.has_dense_rows(logits)
    assert exponentials is None or launches.has_dense_rows(exponentials)
    block, num_warps = launches.launch_of("epilogue", logits.dtype, num_columns, logits.device)
    options = transform_numbers(tile.transform) | {"BLOCK_V": block, "num_warps": num_warps}
    stride_en = 0 if exponentials is None else exponentials.stride(0)
    if tile.replays:
        assert exponentials is not None
        _replay_kernel[(num_rows,)](
            logits, exponentials, tile.bias, tile.labels, state.shift, state.top_ids,
            tile.first_column, num_columns,
            logits.stride(0), stride_en,
            **options,
        )  # fmt: skip
        return
    assert math.isfinite(tile.bound)
    has_statistics, tracks_top = state.rest_entropy_sum is not None, state.top_ids is not None
    is_in_place = exponentials is not None and exponentials.data_ptr() == logits.data_ptr()
    accumulator, low_rank = tile.accumulator, tile.low_rank_accumulator
    _epilogue_kernel[(num_rows,)](
        logits, exponentials, tile.bias, tile.labels, tile.tile_shift,
        accumulator, low_rank,
        state.shift, state.rest_sum, state.logit_sum, state.label_logits, state.rest_entropy_sum,
        state.rest_square_sum,
        state.top_logits, state.top_ids, state.released_ids, state.released_values,
        tile.first_column, num_columns, _width(accumulator), _width(low_rank),
        logits.stride(0), stride_en, _row_stride(accumulator), _row_stride(low_rank),
        bound=tile.bound,
        FINDS_TOP_FIRST=is_in_place or has_statistics or tracks_top,
        HAS_STATISTICS=has_statistics,
        TRACKS_TOP=tracks_top,
        **options,
    )  # fmt: skip


def _width(matrix):
    return 0 if matrix is None else matrix.shape[1]


def _row_stride(matrix):
    return 0 if matrix is None else matrix.stride(0)
