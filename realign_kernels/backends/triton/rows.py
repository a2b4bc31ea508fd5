"""Kernels that pick rows of the weight by token, or add to them. The weight may have any strides.

Letters: **N** rows, **D** hidden size, **V** vocabulary entries of the tile.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

import triton
import triton.language as tl

from realign_kernels.backends.triton import launches
from realign_kernels.backends.triton.transform import narrow, widen

if TYPE_CHECKING:
    from torch import Tensor


@triton.jit
def _label_dot_kernel(
    hidden_ptr, weight_ptr, ids_ptr, out_ptr,
    num_ids, hidden_size,
    stride_hn, stride_wv, stride_wd,
    BLOCK_D: tl.constexpr,
):  # fmt: skip
    """One program owns a row."""
    n = tl.program_id(0).to(tl.int64)  # n * stride overflows int32, and so does token * stride
    token = tl.load(ids_ptr + n)
    if (token >= 0) & (token < num_ids):
        dtype: tl.constexpr = out_ptr.dtype.element_ty
        sums = tl.zeros((BLOCK_D,), dtype)
        for start in range(0, hidden_size, BLOCK_D):
            offs_d = start + tl.arange(0, BLOCK_D).to(tl.int64)
            mask = offs_d < hidden_size
            hidden = tl.load(hidden_ptr + n * stride_hn + offs_d, mask=mask, other=0.0)
            weight = tl.load(
                weight_ptr + token * stride_wv + offs_d * stride_wd, mask=mask, other=0.0
            )
            sums += widen(hidden, dtype) * widen(weight, dtype)
        tl.store(out_ptr + n, tl.load(out_ptr + n) + tl.sum(sums, axis=0))


@triton.jit
def _combine_kernel(
    accumulator_ptr, scale_ptr, weight_ptr, ids_ptr, coefficient_ptr,
    num_ids, hidden_size,
    stride_an, stride_wv, stride_wd,
    BLOCK_D: tl.constexpr,
):  # fmt: skip
    """One program owns a row; a row without a token and with scale 1 is not touched."""
    n = tl.program_id(0).to(tl.int64)
    scale = tl.load(scale_ptr + n)
    token = tl.load(ids_ptr + n)
    has_token = (token >= 0) & (token < num_ids)
    if has_token | (scale != 1.0):
        dtype: tl.constexpr = scale_ptr.dtype.element_ty
        coefficient = tl.load(coefficient_ptr + n)
        for start in range(0, hidden_size, BLOCK_D):
            offs_d = start + tl.arange(0, BLOCK_D).to(tl.int64)
            mask = offs_d < hidden_size
            pointers = accumulator_ptr + n * stride_an + offs_d
            row = scale * widen(tl.load(pointers, mask=mask, other=0.0), dtype)
            if has_token:
                weight = tl.load(
                    weight_ptr + token * stride_wv + offs_d * stride_wd, mask=mask, other=0.0
                )
                row += coefficient * widen(weight, dtype)
            tl.store(pointers, narrow(row, accumulator_ptr.dtype.element_ty), mask=mask)


@triton.jit(do_not_specialize=["num_columns", "num_rows"])
def _add_entries_kernel(
    out_ptr, starts_ptr, order_ptr, coefficient_ptr, hidden_ptr,
    num_columns, hidden_size, num_rows,
    stride_ov, stride_hn,
    BLOCK_E: tl.constexpr, BLOCK_D: tl.constexpr,
):  # fmt: skip
    """One program owns a block of the row of one token, so that sums have a fixed order.

    There is a program for every entry, and the first entry of a token does the work: most tokens
    have no entry.
    """
    entry = tl.program_id(0).to(tl.int64)
    low, high = tl.zeros((), tl.int32), tl.full((), num_columns + 1, tl.int32)
    while low < high:  # the first row that starts after this entry
        middle = (low + high) // 2
        is_past = tl.load(starts_ptr + middle) > entry
        high = tl.where(is_past, middle, high)
        low = tl.where(is_past, low, middle + 1)
    v = low.to(tl.int64) - 1  # the row of this entry, or one outside the tile
    is_row = (v >= 0) & (v < num_columns)
    start = tl.load(starts_ptr + v, mask=is_row, other=-1)
    stop = tl.load(starts_ptr + v + 1, mask=is_row, other=-1)
    if start == entry:
        offs_d = tl.program_id(1) * BLOCK_D + tl.arange(0, BLOCK_D)
        is_column = offs_d < hidden_size
        pointers = out_ptr + v * stride_ov + offs_d
        sums = tl.load(pointers, mask=is_column, other=0.0)
        # A common token has thousands of entries: several rows are loaded at a time.
        for first in range(start, stop, BLOCK_E):
            offs_e = first + tl.arange(0, BLOCK_E)
            is_entry = offs_e < stop
            entries = tl.load(order_ptr + offs_e, mask=is_entry, other=0)
            factors = tl.load(coefficient_ptr + entries, mask=is_entry, other=0.0)
            rows = tl.load(
                hidden_ptr + (entries % num_rows)[:, None] * stride_hn + offs_d[None, :],
                mask=is_entry[:, None] & is_column[None, :],
                other=0.0,
            )  # [BLOCK_E, BLOCK_D]
            sums += tl.sum(factors[:, None] * widen(rows, sums.dtype), axis=0)
        tl.store(pointers, sums, mask=is_column)


def label_dot(hidden: Tensor, weight: Tensor, ids: Tensor, out: Tensor) -> None:
    """Add ``hidden[n] . weight[ids[n]]`` to ``out[n]`` where the id is a row of the weight."""
    num_rows, hidden_size = hidden.shape
    if num_rows == 0:
        return
    assert launches.has_dense_rows(hidden)
    block, num_warps = launches.launch_of("label_dot", out.dtype, hidden_size, out.device)
    _label_dot_kernel[(num_rows,)](
        hidden, weight, ids, out,
        weight.shape[0], hidden_size,
        hidden.stride(0), weight.stride(0), weight.stride(1),
        BLOCK_D=block,
        num_warps=num_warps,
    )  # fmt: skip


def combine(
    accumulator: Tensor, scale: Tensor, weight: Tensor, ids: Tensor, coefficient: Tensor
) -> None:
    """Set each row to ``scale * row + coefficient * weight[id]``; invalid ids add nothing."""
    num_rows, hidden_size = accumulator.shape
    if num_rows == 0:
        return
    assert launches.has_dense_rows(accumulator)
    block, num_warps = launches.launch_of("combine", scale.dtype, hidden_size, scale.device)
    _combine_kernel[(num_rows,)](
        accumulator, scale, weight, ids, coefficient,
        weight.shape[0], hidden_size,
        accumulator.stride(0), weight.stride(0), weight.stride(1),
        BLOCK_D=block,
        num_warps=num_warps,
    )  # fmt: skip


def add_entries(
    out: Tensor, starts: Tensor, order: Tensor, coefficient: Tensor, hidden: Tensor
) -> None:
    """Add ``coefficient * hidden`` of the entries ``order[starts[v]:starts[v + 1]]`` to row v."""
    num_columns, hidden_size = out.shape
    if num_columns == 0 or hidden_size == 0 or len(order) == 0:
        return
    assert launches.has_dense_rows(out)
    assert launches.has_dense_rows(hidden)
    block, num_warps = launches.launch_of("add_entries", out.dtype, hidden_size, out.device)
    _add_entries_kernel[(len(order), triton.cdiv(hidden_size, block))](
        out, starts, order, coefficient, hidden,
        num_columns, hidden_size, hidden.shape[0],
        out.stride(0), hidden.stride(0),
        BLOCK_E=launches.ENTRIES_AT_A_TIME, BLOCK_D=block,
        num_warps=num_warps,
    )  # fmt: skip
