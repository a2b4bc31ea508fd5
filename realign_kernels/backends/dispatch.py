"""Which implementation runs.  A pure choice: knows names and devices, no maths.

Explicit requests never fall back; only ``"auto"`` chooses.
"""

from __future__ import annotations

import ctypes
import importlib
import importlib.util
import os
from typing import TYPE_CHECKING, cast

import torch  # noqa: F401

if TYPE_CHECKING:
    from realign_kernels.backends.kernel_set import KernelSet

_MODULES = {"triton": "realign_kernels.backends.triton", "cpu": "realign_kernels.backends.cpu"}
# Why a backend cannot run.  Looked up once, here: torch.compile traces what is asked on each call.
_REASONS = {}
_library = importlib.util.find_spec("realign_kernels._csrc")
if _library is None or _library.origin is None:
    _REASONS["cpu"] = "the package was installed without a C++ compiler"
else:
    try:
        ctypes.CDLL(_library.origin)  # after torch, whose OpenMP runtime it shares
    except OSError as error:
        _REASONS["cpu"] = f"its library does not load, {error}; install the package again"
if importlib.util.find_spec("triton") is None:
    _REASONS["triton"] = "there is no triton here"


def resolve_backend(backend: str, device_type: str) -> str:
    """Return the backend that runs on a device.

    Raises:
        RuntimeError: The backend was asked for by name and is not installed, or runs on other
            devices.
    """
    if backend == "auto":
        return auto_backend(device_type)
    missing = _missing(backend)
    if missing is not None:
        raise RuntimeError(
            f"backend must be installed to be asked for by name, got {backend!r}: {missing}. "
            "Pass backend='auto' or backend='eager'."
        )
    if (backend == "cpu" and device_type != "cpu") or (
        backend == "triton" and not _is_gpu(device_type) and not interprets_triton()
    ):
        raise RuntimeError(
            f"backend must fit the device {device_type!r} of hidden_states, got {backend!r}. "
            "Move the tensors, or pass backend='auto' or backend='eager'."
        )
    return backend


def auto_backend(device_type: str) -> str:
    """Return the fused backend of a device where it is installed, or else eager."""
    wanted = "triton" if _is_gpu(device_type) else device_type
    return wanted if wanted in _MODULES and _missing(wanted) is None else "eager"


def interprets_triton() -> bool:
    """Tell whether Triton's interpreter is on, which runs its kernels on a CPU, slowly."""
    return os.environ.get("TRITON_INTERPRET", "0") == "1"


def kernels_of(backend: str) -> KernelSet:
    """Load the kernels of a fused backend."""
    return cast("KernelSet", importlib.import_module(_MODULES[backend]))


def describe_backends() -> dict[str, str]:
    """Say, for every backend name, what it would do here and why.

    Returns:
        descriptions: One sentence a name, in the order of ``BACKENDS``; ``"auto"`` starts with the
            backend that it chooses for tensors on the CPU.
    """
    chosen = resolve_backend("auto", "cpu")
    fused = {
        "triton": "fused kernels for CUDA, ROCm and XPU",
        "cpu": "fused C++ kernels for CPUs",
    }
    descriptions = {
        "auto": f"{chosen} on CPUs, {resolve_backend('auto', 'cuda')} on GPUs",
        "eager": "available: plain PyTorch on any device and dtype; recomputes logits tile by "
        "tile in the backward",
    }
    for name, purpose in fused.items():
        missing = _missing(name)
        state = "available" if missing is None else f"not installed ({missing})"
        descriptions[name] = f"{state}: {purpose}"
    if _missing("cpu") is None:
        descriptions["cpu"] += f", {kernels_of('cpu').instruction_set()}"  # type: ignore[attr-defined]
    return descriptions


def _is_gpu(device_type: str) -> bool:
    return device_type in ("cuda", "xpu")


def _missing(backend: str) -> str | None:
    """Return why a backend cannot run, or None."""
    return _REASONS.get(backend)
