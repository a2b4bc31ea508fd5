"""The logit transform inside kernels, and conversions of numbers.

Scale, softcap and temperature are 64-bit arguments, so that a new value does not compile a kernel
again, and none is rounded before it is converted to the computing dtype.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch
import triton
import triton.language as tl

if TYPE_CHECKING:
    from realign_kernels.head import LogitTransform

# Triton's dtypes of operands, by those of torch.
DTYPES = {
    torch.float16: tl.float16,
    torch.bfloat16: tl.bfloat16,
    torch.float32: tl.float32,
    torch.float64: tl.float64,
}


def transform_numbers(transform: LogitTransform) -> dict[str, float | bool]:
    """Return the factors of a transform as arguments of a kernel."""
    softcap, temperature = transform.logit_softcap, transform.temperature
    linear = transform.logit_scale / temperature
    if softcap is None:
        return {"inner": linear, "outer": 1.0, "inverse": 1.0, "linear": linear, "CAPS": False}
    return {
        "inner": transform.logit_scale / softcap,
        "outer": softcap / temperature,
        "inverse": temperature / softcap,
        "linear": linear,
        "CAPS": True,
    }


@triton.jit
def rounded_numbers(inner, outer, inverse, linear, dtype: tl.constexpr):
    """Return the numbers of a transform in the computing dtype."""
    return (
        tl.full((), inner, dtype),
        tl.full((), outer, dtype),
        tl.full((), inverse, dtype),
        tl.full((), linear, dtype),
    )


@triton.jit
def _tanh(x):
    """Compute tanh to an ulp or two, odd, and without cancellation near 0.

    Source: Cephes (Moshier), tanhf.c and tanh.c.  Not libdevice's, which the interpreter lacks.
    """
    square = x * x
    if x.dtype == tl.float64:
        top = (-9.64399179425052238628e-1 * square - 9.92877231001918586564e1) * square
        top = top - 1.61468768441708447952e3
        bottom = ((square + 1.12811678491632931402e2) * square + 2.23548839060100448583e3) * square
        bottom = bottom + 4.84406305325125486048e3
        rest = top / bottom
    else:
        rest = (-5.70498872745e-3 * square + 2.06390887954e-2) * square - 5.37397155531e-2
        rest = (rest * square + 1.33314422036e-1) * square - 3.33332819422e-1
    near = x + x * square * rest
    # 2 / (inf + 1) is 0, as it should be.
    magnitude = 1.0 - 2.0 / (tl.exp(2.0 * tl.abs(x)) + 1.0)
    far = tl.where(x < 0, -magnitude, magnitude)
    return tl.where(tl.abs(x) < 0.625, near, far)


@triton.jit
def transformed(z, numbers, CAPS: tl.constexpr):
    """Return x of raw logits."""
    if CAPS:
        return _tanh(z * numbers[0]) * numbers[1]
    else:
        return z * numbers[0]


@triton.jit
def slope_of(x, numbers, CAPS: tl.constexpr):
    """Return phi = dx/dz as a function of x."""
    if CAPS:
        tanh = x * numbers[2]
        return (1.0 - tanh * tanh) * numbers[3]
    else:
        return tl.zeros_like(x) + numbers[3]


@triton.jit
def log1p(y):
    """Return log(1 + y) for y >= 0, and infinity and NaN as they are.

    The rounding of 1 + y cancels, so no library is needed.  Source: Goldberg 1991, theorem 4.
    """
    u = 1.0 + y
    is_plain = (u == 1.0) | (u == float("inf"))
    return tl.where(is_plain, y, tl.log(u) * (y / tl.where(is_plain, 1.0, u - 1.0)))


@triton.jit
def widen(x, dtype: tl.constexpr):
    """Convert to the computing dtype."""
    # Through float32, since the interpreter reads bfloat16 as integers in any other conversion.
    if x.dtype == tl.bfloat16:
        x = x.to(tl.float32)
    return x.to(dtype)


@triton.jit
def narrow(x, dtype: tl.constexpr):
    """Round to the nearest number of the stored dtype; the interpreter truncates to bfloat16."""
    if dtype == tl.bfloat16:
        x = x.to(tl.float32)
    return x.to(dtype)
