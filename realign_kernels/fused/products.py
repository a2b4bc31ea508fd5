"""Matrix products whose results are never rounded to half precision, by the vendor's BLAS."""

from __future__ import annotations

import functools

import torch
from torch import Tensor

_GPUS = ("cuda", "xpu")


def mm_into(out: Tensor, a: Tensor, b: Tensor) -> None:
    """Set ``out = a @ b``, summed and stored in the dtype of ``out``."""
    if a.dtype == out.dtype:
        torch.mm(a, b, out=out)
    elif a.device.type in _GPUS:
        torch.mm(a, b, out_dtype=out.dtype, out=out)
    else:
        # CPUs have no such product.  Half operands get here in Triton's interpreter only.
        torch.mm(a.to(out.dtype), b.to(out.dtype), out=out)


def addmm_into(out: Tensor, a: Tensor, b: Tensor) -> None:
    """Add ``a @ b`` to ``out`` in the dtype of ``out``."""
    if a.dtype == out.dtype:
        out.addmm_(a, b)
    elif a.device.type not in _GPUS:
        out.addmm_(a.to(out.dtype), b.to(out.dtype))
    elif _adds_to_wide(a.device.type, a.dtype):
        torch.addmm(out, a, b, out_dtype=out.dtype, out=out)
    else:
        out.add_(torch.mm(a, b, out_dtype=out.dtype))


@functools.cache
def _adds_to_wide(device_type: str, dtype: torch.dtype) -> bool:
    """Tell whether addmm takes half operands and a float32 summand, which it once did not."""
    total = torch.zeros(16, 16, device=device_type)
    ones = torch.ones(16, 16, device=device_type, dtype=dtype)
    try:
        torch.addmm(total, ones, ones, out_dtype=torch.float32, out=total)
    except RuntimeError:
        return False
    return True
