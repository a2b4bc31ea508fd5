"""Precision of float32 products on this machine: TF32 has ten bits of mantissa."""

from __future__ import annotations

from typing import Any

import torch
from torch import nn

EXACT = {"ieee", "none"}  # torch's names of precisions that do not round the factors


def float32_precision() -> dict[str, str]:
    """Return torch's names of the precision of float32 matrix products and convolutions."""
    backends: Any = torch.backends
    used = (
        {"matmul": backends.cuda.matmul, "convolution": backends.cudnn.conv}
        if torch.cuda.is_available()
        else {"matmul": backends.mkldnn.matmul, "convolution": backends.mkldnn.conv}
    )
    return {name: backend.fp32_precision for name, backend in used.items()}


def computes_exactly(model: nn.Module, *, autocast: bool) -> bool:
    """Return whether a model's products are computed in float32 or better."""
    floats = {p.dtype for p in model.parameters() if p.is_floating_point()}
    is_quantized = any(not p.is_floating_point() for p in model.parameters())
    is_wide = all(torch.finfo(dtype).bits >= 32 for dtype in floats)
    return is_wide and {*float32_precision().values()} <= EXACT and not (autocast or is_quantized)
