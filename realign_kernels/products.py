"""Matrix products whose results are never rounded to half precision, by the vendor's BLAS."""

from __future__ import annotations

import torch
from torch import Tensor


def mm_into(out: Tensor, a: Tensor, b: Tensor) -> None:
    """Set ``out = a @ b``, summed and stored in the dtype of ``out``."""
    if a.dtype == out.dtype:
        torch.mm(a, b, out=out)
    elif a.is_cuda:
        torch.mm(a, b, out_dtype=out.dtype, out=out)
    else:
        # CPUs have no such product.  Half operands get here in Triton's interpreter only.
        torch.mm(a.to(out.dtype), b.to(out.dtype), out=out)


def addmm_into(out: Tensor, a: Tensor, b: Tensor) -> None:
    """Add ``a @ b`` to ``out`` in the dtype of ``out``."""
    if a.dtype == out.dtype:
        out.addmm_(a, b)
    elif a.is_cuda:
        torch.addmm(out, a, b, out_dtype=out.dtype, out=out)
    else:
        out.addmm_(a.to(out.dtype), b.to(out.dtype))
