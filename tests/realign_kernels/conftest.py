"""One thread for every test of the kernels, and memory that is never zero by luck."""

from __future__ import annotations

import functools
import os

import pytest
import torch

from realign_kernels.backends.dispatch import kernels_of
from realign_kernels.tiling import TileShape

DEVICE = os.environ.get("REALIGN_TEST_DEVICE", "cpu")  # cuda: see CONTRIBUTING.md

# The plain kernels, and those of the device that tests run on.
BACKENDS = ["eager", "cpu" if DEVICE == "cpu" else "triton"]

torch.set_num_threads(1)
if DEVICE != "cpu":
    torch.set_default_device(DEVICE)


@pytest.fixture(autouse=True)
def seed():
    """Make draws from the global generator repeat, whatever ran before."""
    torch.manual_seed(0)


@pytest.fixture(scope="module", params=BACKENDS)
def each_backend(request):
    """Run with each backend where a call leaves the choice open."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(
            "realign_kernels.backends.dispatch.auto_backend", lambda device_type: request.param
        )
        yield request.param


@pytest.fixture
def poison_empty(monkeypatch):
    """Fill fresh uninitialised memory with NaN, so that reading it shows."""

    def poisoned(allocate):
        @functools.wraps(allocate)
        def wrapper(*args, **kwargs):
            tensor = allocate(*args, **kwargs)
            return tensor.fill_(float("nan")) if tensor.is_floating_point() else tensor

        return wrapper

    for name in ("empty", "empty_like", "empty_strided"):
        monkeypatch.setattr(torch, name, poisoned(getattr(torch, name)))


@pytest.fixture
def small_tiles(monkeypatch):
    """Cut into tiles of 4 rows by 16 columns: small inputs cross their edges."""
    for name in BACKENDS:
        monkeypatch.setattr(kernels_of(name), "LARGEST_TILE", TileShape(4, 16))
