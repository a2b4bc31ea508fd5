"""Which implementation runs.  A pure choice: knows names and devices, no tensors.

Explicit requests never fall back; only ``"auto"`` chooses.
"""

from __future__ import annotations

BACKENDS = ("auto", "eager", "triton", "cpu")
MEMORY_MODES = ("auto", "stash", "tile", "recompute")

_EAGER_REASON = (
    "plain PyTorch on any device and dtype; recomputes logits tile by tile in the backward"
)

# Backends that the interface names and that this build does not carry, with what they are for.
_MISSING = {
    "triton": "fused kernels for CUDA, ROCm and XPU",
    "cpu": "fused C++ kernels for CPUs",
}


def resolve_backend(backend: str) -> str:
    """Return the name of the backend that runs, or raise if an explicit one cannot."""
    if backend not in BACKENDS:
        raise ValueError(f"backend must be one of {list(BACKENDS)}, got {backend!r}.")
    if backend in _MISSING:
        raise RuntimeError(
            f"backend must be installed to be asked for by name, got {backend!r}, and this build "
            f"has no {_MISSING[backend]}. Pass backend='auto' or backend='eager'."
        )
    return "eager"


def describe_backends() -> dict[str, str]:
    """Say, for every backend name, what it would do here and why.

    Returns:
        descriptions: One sentence a name, in the order of ``BACKENDS``; ``"auto"`` starts with the
            backend it chooses.
    """
    chosen = resolve_backend("auto")
    missing = " nor ".join(f"{name!r}" for name in _MISSING)
    return {
        "auto": f"{chosen}: neither {missing} is installed",
        "eager": f"available: {_EAGER_REASON}",
        **{name: f"not installed: {purpose}" for name, purpose in _MISSING.items()},
    }
