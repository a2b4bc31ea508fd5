"""``realign doctor``: list versions, device and kernel backends, for bug reports."""

from __future__ import annotations

from importlib.metadata import PackageNotFoundError, version

import realign_kernels
from realign import __version__
from realign_kernels import diagnose

PACKAGES = (
    "transformers",
    "accelerate",
    "peft",
    "datasets",
    "sentence-transformers",
    "faiss-cpu",
    "openai",
    "ray",
    "starlette",
    "trl",
    "deepspeed",
    "flash-attn",
    "liger-kernel",
    "bitsandbytes",
)


def diagnosis() -> tuple[list[str], bool]:
    """Return the lines of the report, and whether all of its checks passed."""
    lines = [f"realign {__version__}"]
    is_same = realign_kernels.__version__ == __version__
    if not is_same:
        lines.append(
            f"realign must have realign_kernels {__version__}, got {realign_kernels.__version__}. "
            "Install both again."
        )
    kernels = diagnose()
    lines += kernels.lines
    for package in PACKAGES:
        try:
            lines.append(f"{package} {version(package)}")
        except PackageNotFoundError:
            lines.append(f"{package} not installed")
    return lines, is_same and kernels.is_sound
