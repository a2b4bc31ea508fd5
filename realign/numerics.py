"""What a model's numbers depend on beside its files: device, precision and packages."""

from __future__ import annotations

from importlib.metadata import PackageNotFoundError, version
from typing import Any

import torch

PACKAGES = ("torch", "torchvision", "transformers", "tokenizers", "peft", "pillow")


def numerics() -> dict[str, Any]:
    """Names and versions, for the identity of a result."""
    return {
        "device": torch.cuda.get_device_name() if torch.cuda.is_available() else "cpu",
        "float32": _float32_precision(),
        "packages": {name: version_of(name) for name in PACKAGES},
    }


def is_float32_exact() -> bool:
    """Whether float32 products and convolutions are computed in float32."""
    return {*_float32_precision().values()} <= {"ieee", "none"}


def _float32_precision() -> dict[str, str]:
    """How float32 products are computed: TF32 has ten bits of mantissa."""
    backends: Any = torch.backends
    used = (
        {"matmul": backends.cuda.matmul, "convolution": backends.cudnn.conv}
        if torch.cuda.is_available()
        else {"matmul": backends.mkldnn.matmul, "convolution": backends.mkldnn.conv}
    )
    return {name: backend.fp32_precision for name, backend in used.items()}


def version_of(package: str) -> str:
    """A package's version, or that it is not installed."""
    try:
        return version(package)
    except PackageNotFoundError:
        return "not installed"
