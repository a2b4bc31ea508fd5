"""``realign doctor``: list versions, device and kernel backends, for bug reports."""

from __future__ import annotations

import platform
from collections.abc import Iterator
from importlib.metadata import PackageNotFoundError, version

import torch

from realign_kernels import describe_backends

PACKAGES = (
    "realign",
    "torch",
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
)


def diagnosis() -> Iterator[str]:
    """Yield the lines of the report."""
    yield f"python {platform.python_version()} on {platform.platform()}"
    for package in PACKAGES:
        try:
            yield f"{package} {version(package)}"
        except PackageNotFoundError:
            yield f"{package} not installed"
    device = (
        torch.cuda.get_device_name()
        if torch.cuda.is_available()
        else f"CPU, {torch.get_num_threads()} threads"
    )
    yield f"device: {device}"
    yield "attention: sdpa"
    for backend, state in describe_backends().items():
        yield f"kernel backend {backend}: {state}"
