"""Tiles and products on GPUs: half operands, and results that are never rounded to half."""

from __future__ import annotations

import functools

import torch
from torch import Tensor

from realign_kernels.tiling import TileShape

# Enough for every multiprocessor, with few launches.
LARGEST_TILE = TileShape(4096, 8192)
# 128 bytes in half precision: vectors of 16 bytes stay aligned for any vocabulary, as the fastest
# kernels of a BLAS require.
STRIDE_MULTIPLE = 64
TEMPORARIES = 0


def operand_dtype(computed: torch.dtype, rounded: torch.dtype, *, is_given: bool) -> torch.dtype:
    """Return the dtype of the weight: a GPU sums products of half operands in float32."""
    return rounded


def exponential_dtype(computed: torch.dtype, operand: torch.dtype) -> torch.dtype:
    """Return the dtype of both operands of a product."""
    return operand


def expect_writes(tensor: Tensor) -> None:
    """Do nothing: no tensor needs it on a GPU."""


def product(out: Tensor, a: Tensor, b: Tensor, *, adds: bool) -> None:
    """Set ``out`` to ``a @ b``, or add that, summed and stored in the dtype of ``out``."""
    if a.device.type == "cpu":
        # CPUs have no mixed products.  Half operands only get here in Triton's interpreter.
        a, b = a.to(out.dtype), b.to(out.dtype)
    if a.dtype == out.dtype:
        if adds:
            out.addmm_(a, b)
        else:
            torch.mm(a, b, out=out)
    elif not adds:
        torch.mm(a, b, out_dtype=out.dtype, out=out)
    elif _adds_to_wide(a.device.type, a.dtype):
        torch.addmm(out, a, b, out_dtype=out.dtype, out=out)
    else:
        out.add_(torch.mm(a, b, out_dtype=out.dtype))


@functools.cache
def _adds_to_wide(device_type: str, dtype: torch.dtype) -> bool:
    """Return whether addmm takes half operands and a float32 summand, as older ones do not."""
    total = torch.zeros(16, 16, device=device_type)
    ones = torch.ones(16, 16, device=device_type, dtype=dtype)
    try:
        torch.addmm(total, ones, ones, out_dtype=torch.float32, out=total)
    except RuntimeError:
        return False
    return True
