"""Blocks as small as the inputs for Triton's interpreter, which tests/conftest.py switches on."""

from __future__ import annotations

import os

import numpy as np
import pytest

from tests.realign_kernels.backends.triton.interpreter import quicken

# on a GPU a block has at least one element a thread, see backends/triton/launches.py
BLOCK = 4 if os.environ.get("TRITON_INTERPRET") == "1" else 64

# "fused": every test with the product that has the epilogue inside
PRODUCT = os.environ.get("REALIGN_TEST_PRODUCT", "blas")


@pytest.fixture(autouse=True, scope="session")
def quick_interpreter():
    """Let the interpreter take half of its time."""
    with pytest.MonkeyPatch.context() as patch:
        if os.environ.get("TRITON_INTERPRET") == "1":
            quicken(patch)
        yield


@pytest.fixture(autouse=True)
def quiet_numpy():
    """Let the interpreter compute with infinities without a warning, as a GPU does."""
    with np.errstate(all="ignore"):
        yield


@pytest.fixture(autouse=PRODUCT == "fused")
def fused_product(monkeypatch):
    """Compute logits by the product with the epilogue inside, by blocks and sums that are small."""
    from realign_kernels.backends.triton import launches

    # 16 is the least that a tensor core takes
    small = launches.ProductLaunch(16, 16, 16, 1, 1)
    monkeypatch.setattr(launches, "product_launch", lambda *_, **__: small)
    monkeypatch.setattr(launches, "PARTIAL_SUM", 32)
    monkeypatch.setattr(launches, "fuses_product", lambda *_: True)


@pytest.fixture
def few_rows(monkeypatch):
    """Fill tiles up to 32 rows instead of 64, since the interpreter takes a row at a time."""
    from realign_kernels.backends import triton as kernels
    from realign_kernels.tiling import TileShape

    monkeypatch.setattr(kernels, "LARGEST_TILE", TileShape(32, 8192))


@pytest.fixture
def small_blocks(monkeypatch):
    """Let every kernel handle few elements and 2 entries at a time: small inputs cross edges."""
    from realign_kernels.backends.triton import launches

    monkeypatch.setattr(launches, "launch_of", lambda *_: launches.Launch(BLOCK, 1))
    monkeypatch.setattr(launches, "ENTRIES_AT_A_TIME", 2)
