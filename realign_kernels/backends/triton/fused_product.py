"""The product of hidden states and weight with the epilogue inside.

It is an alternative to a BLAS followed by ``epilogue.py``. A program owns a block of rows by a
block of columns: logits stay in its registers, and it stores only E and two numbers per row. A
second kernel, with one program per row, adds up the blocks in a fixed order and moves the shift if
it must.

The product is summed over at most 1024 of the hidden size at a time, and these partial sums are
added in float32, which rounds to nearest.  Tensor cores truncate their sums, so this bounds their
bias for any hidden size.

NOTHING HERE HAS RUN ON A GPU: the interpreter computes it, and it compiles for sm_80, sm_90 and
gfx942.  Letters: **N** rows, **D** hidden size, **V** columns of the tile.
"""

from __future__ import annotations

import functools
import math
from typing import TYPE_CHECKING

import torch
import triton
import triton.language as tl

from realign_kernels.backends.triton import launches
from realign_kernels.backends.triton.transform import (
    narrow,
    rounded_numbers,
    slope_of,
    transform_numbers,
    transformed,
    widen,
)
from realign_kernels.head import LogitTransform

if TYPE_CHECKING:
    from torch import Tensor

    from realign_kernels.backends.kernel_set import Tile

_RAW, _SUM, _REPLAY = 0, 1, 2
_LEAST_DEPTH = 16  # the smallest inner size that a tensor core multiplies
_IDENTITY = LogitTransform(1.0, None, 1.0)


@triton.jit
def _product_block(
    hidden_ptr, weight_ptr, last_row, last_column, hidden_size,
    stride_hn, stride_wv, stride_wd,
    PRECISION: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_V: tl.constexpr, BLOCK_D: tl.constexpr,
    PARTIAL_D: tl.constexpr, HAS_WHOLE_BLOCKS: tl.constexpr,
):  # fmt: skip
    """Return the logits of a block, summed over ``PARTIAL_D`` of the hidden size at a time.

    Past the last row or column that one is read again, so that no mask is needed.
    """
    offs_d = tl.arange(0, BLOCK_D)
    # int32 is enough within a block, and takes half as many registers.
    offs_n = tl.minimum(tl.arange(0, BLOCK_N), last_row)
    offs_v = tl.minimum(tl.arange(0, BLOCK_V), last_column)
    offs_h = offs_n[:, None] * stride_hn + offs_d[None, :]
    offs_w = offs_v[None, :] * stride_wv + offs_d[:, None] * stride_wd
    total = tl.zeros((BLOCK_N, BLOCK_V), tl.float32)
    for first in range(0, hidden_size, PARTIAL_D):
        partial = tl.zeros((BLOCK_N, BLOCK_V), tl.float32)
        for start in range(first, tl.minimum(first + PARTIAL_D, hidden_size), BLOCK_D):
            if HAS_WHOLE_BLOCKS:
                hidden = tl.load(hidden_ptr + offs_h)
                weight = tl.load(weight_ptr + offs_w)
            else:
                is_hidden = offs_d < hidden_size - start
                hidden = tl.load(hidden_ptr + offs_h, mask=is_hidden[None, :], other=0.0)
                weight = tl.load(weight_ptr + offs_w, mask=is_hidden[:, None], other=0.0)
            partial = tl.dot(hidden, weight, partial, input_precision=PRECISION)
            hidden_ptr += BLOCK_D
            weight_ptr += BLOCK_D * stride_wd
        total += partial
    return total


@triton.jit
def _column_in_block(ids_ptrs, is_row, first_column, BLOCK_V: tl.constexpr):
    """Return the columns of tokens in a block, or -1; int32, as all columns are compared to it."""
    columns = tl.load(ids_ptrs, mask=is_row, other=-1) - first_column
    return tl.where((columns >= 0) & (columns < BLOCK_V), columns, -1).to(tl.int32)


@triton.jit
def _fused_product_kernel(
    hidden_ptr, weight_ptr, low_rank_ptr, factor_ptr, bias_ptr, labels_ptr, top_ids_ptr, shift_ptr,
    out_ptr, block_sums_ptr, block_shifts_ptr,
    num_rows, num_columns, hidden_size, rank, first_column,
    stride_hn, stride_wv, stride_wd, stride_rn, stride_fv, stride_fr, stride_on,
    bound: tl.float64, inner: tl.float64, outer: tl.float64, inverse: tl.float64,
    linear: tl.float64,
    CAPS: tl.constexpr, MODE: tl.constexpr, PRECISION: tl.constexpr,
    BLOCK_N: tl.constexpr, BLOCK_V: tl.constexpr, BLOCK_D: tl.constexpr, PARTIAL_D: tl.constexpr,
    LEAST_DEPTH: tl.constexpr, HAS_WHOLE_BLOCKS: tl.constexpr, BLOCKS_AT_A_TIME: tl.constexpr,
    NUM_PROGRAMS: tl.constexpr,
):  # fmt: skip
    """Each program computes every ``NUM_PROGRAMS``-th block; no two write to the same address."""
    numbers = rounded_numbers(inner, outer, inverse, linear, tl.float32)
    num_blocks_n = tl.cdiv(num_rows, BLOCK_N)
    num_blocks_v = tl.cdiv(num_columns, BLOCK_V)
    for block in range(tl.program_id(0), num_blocks_n * num_blocks_v, NUM_PROGRAMS):
        # Programs that run at the same time share rows, and columns of the weight, in the cache.
        group = block // (BLOCKS_AT_A_TIME * num_blocks_v)
        first_block = group * BLOCKS_AT_A_TIME
        height = tl.minimum(num_blocks_n - first_block, BLOCKS_AT_A_TIME)
        in_group = block - group * BLOCKS_AT_A_TIME * num_blocks_v
        block_n = first_block + in_group % height
        block_v = in_group // height

        # Times a stride these may overflow int32, so they go into the pointers once per block.
        first_n = block_n.to(tl.int64) * BLOCK_N
        first_v = block_v.to(tl.int64) * BLOCK_V
        last_n = (num_rows - 1 - first_n).to(tl.int32)
        last_v = (num_columns - 1 - first_v).to(tl.int32)
        logits = _product_block(
            hidden_ptr + first_n * stride_hn, weight_ptr + first_v * stride_wv,
            last_n, last_v, hidden_size, stride_hn, stride_wv, stride_wd,
            PRECISION, BLOCK_N, BLOCK_V, BLOCK_D, PARTIAL_D, HAS_WHOLE_BLOCKS,
        )  # fmt: skip
        if low_rank_ptr is not None:
            logits += _product_block(
                low_rank_ptr + first_n * stride_rn, factor_ptr + first_v * stride_fv,
                last_n, last_v, rank, stride_rn, stride_fv, stride_fr,
                PRECISION, BLOCK_N, BLOCK_V, LEAST_DEPTH, PARTIAL_D, False,
            )  # fmt: skip
        offs_n, offs_v = tl.arange(0, BLOCK_N), tl.arange(0, BLOCK_V)
        is_row, is_column = offs_n <= last_n, offs_v <= last_v
        is_inside = is_row[:, None] & is_column[None, :]
        out_ptrs = out_ptr
        if out_ptr is not None:
            out_ptrs = out_ptr + first_n * stride_on + first_v
            out_ptrs = out_ptrs + offs_n[:, None] * stride_on + offs_v[None, :]
        if MODE == 0:
            tl.store(out_ptrs, logits, mask=is_inside)
        else:
            if bias_ptr is not None:
                bias = tl.load(bias_ptr + first_v + offs_v, mask=is_column, other=0.0)
                logits += bias[None, :]
            x = transformed(logits, numbers, CAPS)
            own_columns = first_column + first_v
            label = _column_in_block(labels_ptr + first_n + offs_n, is_row, own_columns, BLOCK_V)
            is_counted = is_inside & (offs_v[None, :] != label[:, None])
            if top_ids_ptr is not None:
                top = _column_in_block(top_ids_ptr + first_n + offs_n, is_row, own_columns, BLOCK_V)
                is_counted = is_counted & (offs_v[None, :] != top[:, None])
            shift = tl.load(shift_ptr + first_n + offs_n, mask=is_row, other=0.0)
            if MODE == 1:
                # NaN never wins a comparison; it reaches the sums through exp instead.
                is_number = is_counted & (x == x)
                largest = tl.max(tl.where(is_number, x, -float("inf")), axis=1)
                # True where the shift is -inf, as it starts in float16, and a logit is finite.
                moves = largest - shift > tl.full((), bound, tl.float32)
                shift = tl.where(moves, largest, shift)
            # If all x so far are -inf, every exponential is 0; -inf - -inf would give NaN.
            finite_shift = tl.where(shift == -float("inf"), 0.0, shift)
            e = tl.exp(tl.where(is_counted, x - finite_shift[:, None], -float("inf")))
            if MODE == 1:
                place = block_v.to(tl.int64) * num_rows + first_n + offs_n
                tl.store(block_sums_ptr + place, tl.sum(e, axis=1), mask=is_row)
                tl.store(block_shifts_ptr + place, shift, mask=is_row)
            if out_ptr is not None:
                entry = e * slope_of(x, numbers, CAPS)
                # Selected, since a slope may be infinite, and 0 * inf is NaN.
                entry = tl.where(is_counted, entry, 0.0)
                entry = narrow(entry, out_ptr.dtype.element_ty)
                tl.store(out_ptrs, entry, mask=is_inside)


@triton.jit
def _scale_columns(row_ptr, num_columns, factor, BLOCK: tl.constexpr):
    for start in range(0, num_columns, BLOCK):
        offs = start + tl.arange(0, BLOCK)
        row = tl.load(row_ptr + offs, mask=offs < num_columns, other=0.0)
        scaled = narrow(widen(row, factor.dtype) * factor, row_ptr.dtype.element_ty)
        tl.store(row_ptr + offs, scaled, mask=offs < num_columns)


@triton.jit
def _settle_rows_kernel(
    block_sums_ptr, block_shifts_ptr, exponentials_ptr, accumulator_ptr, low_rank_ptr,
    shift_ptr, rest_sum_ptr, tile_shift_ptr,
    num_rows, num_columns, hidden_size, rank, num_blocks,
    stride_en, stride_an, stride_rn,
    BLOCK_V: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """Add up the blocks of one row, relative to the largest of their shifts."""
    n = tl.program_id(0).to(tl.int64)
    old_shift = tl.load(shift_ptr + n)
    shift = old_shift
    for start in range(0, num_blocks, BLOCK):
        offs_b = start + tl.arange(0, BLOCK)
        is_block = offs_b < num_blocks
        shifts = tl.load(
            block_shifts_ptr + offs_b.to(tl.int64) * num_rows + n, mask=is_block,
            other=-float("inf"),
        )  # fmt: skip
        largest = tl.max(tl.where(shifts == shifts, shifts, -float("inf")), axis=0)
        shift = tl.where(largest > shift, largest, shift)  # a shift that is NaN stays
    finite_shift = tl.where(shift == -float("inf"), 0.0, shift)
    sums = tl.zeros((BLOCK,), shift.dtype)
    has_moved = (old_shift != shift) & (shift == shift)
    for start in range(0, num_blocks, BLOCK):
        offs_b = start + tl.arange(0, BLOCK)
        is_block = offs_b < num_blocks
        place = offs_b.to(tl.int64) * num_rows + n
        shifts = tl.load(block_shifts_ptr + place, mask=is_block, other=-float("inf"))
        added = tl.load(block_sums_ptr + place, mask=is_block, other=0.0)
        decay = tl.where(shifts == shift, 1.0, tl.exp(shifts - finite_shift))
        sums += tl.where(is_block, added * decay, 0.0)
    rest_sum = tl.load(rest_sum_ptr + n)
    if has_moved:
        decay = tl.exp(old_shift - shift)
        rest_sum *= decay
        if accumulator_ptr is not None:
            _scale_columns(accumulator_ptr + n * stride_an, hidden_size, decay, BLOCK)
        if low_rank_ptr is not None:
            _scale_columns(low_rank_ptr + n * stride_rn, rank, decay, BLOCK)
        if exponentials_ptr is not None:
            shifts_ptr = block_shifts_ptr + n
            for b in range(num_blocks):
                block_shift = tl.load(shifts_ptr)
                shifts_ptr += num_rows
                if block_shift != shift:
                    width = tl.minimum(num_columns - b * BLOCK_V, BLOCK_V)
                    _scale_columns(
                        exponentials_ptr + n * stride_en + b * BLOCK_V, width,
                        tl.exp(block_shift - shift), BLOCK,
                    )  # fmt: skip
    tl.store(shift_ptr + n, shift)
    tl.store(rest_sum_ptr + n, rest_sum + tl.sum(sums, axis=0))
    if tile_shift_ptr is not None:
        tl.store(tile_shift_ptr + n, shift)


def is_faster(operand: torch.dtype, device: torch.device) -> bool:
    """Return whether the product with the epilogue inside is faster than a BLAS and an epilogue."""
    return launches.fuses_product(operand, device)


def exact_product(
    out: Tensor, hidden: Tensor, weight: Tensor, low_rank: tuple[Tensor, Tensor] | None = None
) -> None:
    """Set ``out`` (N, V), float32, to ``hidden @ weight.T``, by bounded partial sums.

    The product of ``low_rank``, (N, K) and (V, K) of the same dtype, is added.
    """
    _launch(out, (hidden, weight), low_rank, None, None, None, mode=_RAW)


def fused_product(
    tile: Tile, hidden: Tensor, weight: Tensor, low_rank: tuple[Tensor, Tensor] | None = None
) -> None:
    """Compute the logits of a tile and fold them into the sums of its rows.

    The results are those of a product followed by ``epilogue.epilogue``, but the logits are never
    stored: ``tile.logits`` only states the shape and dtype. No statistics are taken, and no top
    token is tracked.
    """
    state, exponentials = tile.state, tile.exponentials
    num_rows, num_columns = tile.logits.shape
    if num_rows == 0:
        return
    assert state.rest_entropy_sum is None
    if tile.replays:
        _launch(exponentials, (hidden, weight), low_rank, tile, None, None, mode=_REPLAY)
        return
    assert math.isfinite(tile.bound)
    assert state.top_ids is None
    shape = _shape(hidden, low_rank)
    num_blocks = triton.cdiv(num_columns, shape.columns)
    sums = state.rest_sum.new_empty(num_blocks, num_rows)
    shifts = torch.empty_like(sums)
    _launch(exponentials, (hidden, weight), low_rank, tile, sums, shifts, mode=_SUM)
    accumulator, other = tile.accumulator, tile.low_rank_accumulator
    block, num_warps = launches.launch_of("settle", sums.dtype, num_blocks, sums.device)
    _settle_rows_kernel[(num_rows,)](
        sums, shifts, exponentials, accumulator, other,
        state.shift, state.rest_sum, tile.tile_shift,
        num_rows, num_columns, _width(accumulator), _width(other), num_blocks,
        _row_stride(exponentials), _row_stride(accumulator), _row_stride(other),
        BLOCK_V=shape.columns, BLOCK=block,
        num_warps=num_warps,
    )  # fmt: skip


def _launch(
    out: Tensor | None,
    operands: tuple[Tensor, Tensor],
    low_rank: tuple[Tensor, Tensor] | None,
    tile: Tile | None,
    sums: Tensor | None,
    shifts: Tensor | None,
    *,
    mode: int,
) -> None:
    (hidden, weight), (others, factor) = operands, low_rank or (None, None)
    num_rows, hidden_size = hidden.shape
    num_columns = weight.shape[0]
    if num_rows == 0 or num_columns == 0:
        return
    assert out is None or launches.has_dense_rows(out)
    assert launches.has_dense_rows(hidden)
    assert others is None or (others.dtype == hidden.dtype and launches.has_dense_rows(others))
    shape = _shape(hidden, low_rank)
    if hidden.device.type == "cpu" and hidden.dtype == torch.bfloat16:
        # The interpreter multiplies bfloat16 as integers.  The sizes of blocks stay as they are.
        hidden, weight = hidden.float(), weight.float()
        if others is not None and factor is not None:
            others, factor = others.float(), factor.float()
    num_blocks = triton.cdiv(num_rows, shape.rows) * triton.cdiv(num_columns, shape.columns)
    num_programs = min(num_blocks, _num_multiprocessors(hidden.device))
    state = None if tile is None else tile.state
    uses_tf32 = hidden.dtype == torch.float32 and torch.get_float32_matmul_precision() != "highest"
    _fused_product_kernel[(num_programs,)](
        hidden, weight, others, factor, None if tile is None else tile.bias,
        None if tile is None else tile.labels,
        None if state is None else state.top_ids,
        None if state is None else state.shift,
        out, sums, shifts,
        num_rows, num_columns, hidden_size, _width(others),
        0 if tile is None else tile.first_column,
        hidden.stride(0), weight.stride(0), weight.stride(1),
        _row_stride(others), _row_stride(factor), 0 if factor is None else factor.stride(1),
        _row_stride(out),
        bound=tile.bound if tile is not None and mode == _SUM else 0.0,
        **transform_numbers(_IDENTITY if tile is None else tile.transform),
        MODE=mode,
        PRECISION="tf32" if uses_tf32 else "ieee",
        BLOCK_N=shape.rows, BLOCK_V=shape.columns, BLOCK_D=shape.depth,
        PARTIAL_D=max(launches.PARTIAL_SUM, shape.depth),
        LEAST_DEPTH=_LEAST_DEPTH,
        HAS_WHOLE_BLOCKS=hidden_size % shape.depth == 0,
        BLOCKS_AT_A_TIME=launches.BLOCKS_AT_A_TIME, NUM_PROGRAMS=num_programs,
        num_warps=shape.num_warps, num_stages=shape.num_stages,
    )  # fmt: skip


def _shape(hidden: Tensor, low_rank: tuple[Tensor, Tensor] | None) -> launches.ProductLaunch:
    has_low_rank = low_rank is not None
    return launches.product_launch(hidden.dtype, hidden.device, has_low_rank=has_low_rank)


@functools.cache
def _num_multiprocessors(device: torch.device) -> int:
    if device.type == "cuda":
        return torch.cuda.get_device_properties(device).multi_processor_count
    if device.type == "xpu":
        return torch.xpu.get_device_properties(device).gpu_subslice_count
    return 2  # in the interpreter, so that each of two programs computes several blocks


def _width(matrix: Tensor | None) -> int:
    return 0 if matrix is None else matrix.shape[1]


def _row_stride(matrix: Tensor | None) -> int:
    return 0 if matrix is None else matrix.stride(0)
