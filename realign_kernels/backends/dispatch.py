"""The choice of a backend, from names and devices.

Explicit requests never fall back; only ``"auto"`` chooses.
"""

from __future__ import annotations

import ctypes
import functools
import importlib
import importlib.util
import os
import sys
from contextlib import nullcontext
from typing import TYPE_CHECKING, Any, NamedTuple, cast

import torch

from realign_kernels.installation import library_was_removed

if TYPE_CHECKING:
    from contextlib import AbstractContextManager

    from torch import Tensor

    from realign_kernels.backends.kernel_set import KernelSet


class Backend(NamedTuple):
    """A kernel set: its module, its devices and its description."""

    module: str
    device_types: tuple[str, ...] | None  # None: any
    purpose: str


# In the order of messages; "auto" takes the first one that names the device type.
BACKENDS = {
    "eager": Backend("realign_kernels.backends.torch", None, "plain PyTorch on any device"),
    "triton": Backend(
        "realign_kernels.backends.triton",
        ("cuda", "xpu"),
        "fused kernels for CUDA, ROCm and XPU",
    ),
    "cpu": Backend("realign_kernels.backends.cpu", ("cpu",), "fused C++ kernels for CPUs"),
}
# Why a backend cannot run.  Found once, at import, since torch.compile would trace it in each call.
_REASONS = {}
_library = importlib.util.find_spec("realign_kernels._csrc")
if _library is None or _library.origin is None:
    _REASONS["cpu"] = "the package was installed without a C++ compiler"
    if library_was_removed():
        _REASONS["cpu"] = "its library was removed with another distribution; install it again"
else:
    try:
        ctypes.CDLL(_library.origin)  # after torch, whose OpenMP runtime it shares
    except OSError as error:
        _REASONS["cpu"] = f"its library does not load, {error}; install the package again"
if importlib.util.find_spec("triton") is None:
    _REASONS["triton"] = "the package triton is missing"


def resolve_backend(backend: str, device_type: str) -> str:
    """Return the backend that runs on a device.

    Raises:
        ValueError: There is no backend with that name.
        RuntimeError: The backend was asked for by name and is not installed, or runs on other
            devices.
    """
    if backend == "auto":
        return auto_backend(device_type)
    if backend not in BACKENDS:
        names = ["auto", *BACKENDS]
        raise ValueError(
            f"backend must be one of {names}, got {backend!r}. Leave it out for the default."
        )
    missing = _missing(backend)
    if missing is not None:
        raise RuntimeError(
            f"backend must be installed to be asked for by name, got {backend!r}: {missing}. "
            "Pass backend='auto' or backend='eager'."
        )
    device_types = BACKENDS[backend].device_types
    is_interpreted = backend == "triton" and _interprets_triton()
    if device_types is not None and device_type not in device_types and not is_interpreted:
        raise RuntimeError(
            f"backend must fit the device {device_type!r} of hidden_states, got {backend!r}. "
            "Move the tensors, or pass backend='auto' or backend='eager'."
        )
    if not is_interpreted and not _has_products(backend, device_type):
        raise RuntimeError(
            f"backend {backend!r} requires torch.mm with half operands and a float32 result, which "
            f"this build of torch lacks on {device_type!r}. "
            "Pass backend='auto' or backend='eager', or install a newer torch."
        )
    return backend


def auto_backend(device_type: str) -> str:
    """Return the fused backend of a device if it is installed, or else eager."""
    for name, backend in BACKENDS.items():
        if (
            device_type in (backend.device_types or ())
            and _missing(name) is None
            and _has_products(name, device_type)
        ):
            return name
    return "eager"


def _has_products(backend: str, device_type: str) -> bool:
    """Return whether torch has the products that a backend needs on a device.

    CUDA builds have them; older ROCm and XPU builds do not.
    """
    may_lack_them = device_type == "xpu" or torch.version.hip is not None
    return backend != "triton" or not may_lack_them or _multiplies_to_float32(device_type)


@torch.compiler.assume_constant_result  # type: ignore[untyped-decorator]
def _multiplies_to_float32(device_type: str) -> bool:
    """Return whether a product of half operands can be returned in float32 on a device."""
    return _probe_product(device_type)


@functools.cache
def _probe_product(device_type: str) -> bool:
    ones = torch.ones(16, 16, dtype=torch.bfloat16, device=device_type)
    try:
        torch.mm(ones, ones, out_dtype=torch.float32)
    except RuntimeError:
        return False
    return True


def kernels_of(backend: str) -> KernelSet:
    """Load the kernels of a backend."""
    name = BACKENDS[backend].module
    # Looked up first, since importlib takes longer, and this runs several times per call.
    return cast("KernelSet", sys.modules.get(name) or importlib.import_module(name))


def on_device_of(tensor: Tensor) -> AbstractContextManager[Any]:
    """Return a context in which the device of a tensor is the current one, on which Triton launches
    whatever the device of a kernel's arguments.
    """
    if tensor.device.type not in ("cuda", "xpu"):
        return nullcontext()
    context: AbstractContextManager[Any] = torch.get_device_module(tensor.device).device_of(tensor)
    return context


def describe_backends() -> dict[str, str]:
    """Describe each backend on this machine, and which one ``"auto"`` chooses.

    Returns:
        descriptions: One phrase per name, with the reason if a backend is not available; ``"auto"``
            comes first and names the backends that it chooses on CPUs and on GPUs.

    Example::

        >>> from realign_kernels import describe_backends
        >>> list(describe_backends())
        ['auto', 'eager', 'triton', 'cpu']
    """
    chosen = resolve_backend("auto", "cpu")
    descriptions = {"auto": f"{chosen} on CPUs, {resolve_backend('auto', 'cuda')} on GPUs"}
    for name, backend in BACKENDS.items():
        missing = _missing(name)
        state = "available" if missing is None else f"not installed ({missing})"
        descriptions[name] = f"{state}: {backend.purpose}"
    if _missing("cpu") is None:
        cpu = importlib.import_module(BACKENDS["cpu"].module)
        descriptions["cpu"] += f", {cpu.instruction_set()}, bfloat16: {cpu.product_set()}"
    return descriptions


def _interprets_triton() -> bool:
    """Return whether Triton's interpreter is on, which runs kernels on a CPU, slowly."""
    return os.environ.get("TRITON_INTERPRET", "0") == "1"


def _missing(backend: str) -> str | None:
    """Return why a backend cannot run, or None."""
    return _REASONS.get(backend)
