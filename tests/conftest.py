"""Settings that every test shares, and which tests are there."""

from __future__ import annotations

import gc
import os
import subprocess
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any

# before any import of the libraries that read them
os.environ["HF_HUB_OFFLINE"] = "1"
os.environ["TOKENIZERS_PARALLELISM"] = "false"
# tests run in parallel processes and start others: one thread each, and none that spins
os.environ.setdefault("OMP_NUM_THREADS", "1")
os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")
# there is no GPU in CI: elsewhere none is seen, and its kernels run in Triton's interpreter
if "REALIGN_TEST_DEVICE" not in os.environ:
    os.environ |= {"CUDA_VISIBLE_DEVICES": "", "HIP_VISIBLE_DEVICES": ""}
    os.environ.setdefault("TRITON_INTERPRET", "1")

import pytest
import torch

# every test that was found, also those that -m leaves out
FOUND = pytest.StashKey[list[pytest.Item]]()


@pytest.hookimpl(tryfirst=True)
def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    """Keep what was found, before any of it is left out."""
    config.stash[FOUND] = [*items]


def pytest_collection_finish() -> None:
    """Keep what is imported and collected out of every later search for garbage: each training run
    asks for some, and to visit the objects of thousands of tests takes a second.
    """
    gc.collect()
    gc.freeze()


@pytest.fixture(autouse=True, scope="session")
def _one_thread() -> None:
    """Use one thread, which also makes sums repeatable."""
    torch.set_num_threads(1)


@contextmanager
def running(command: Sequence[object], **options: Any) -> Iterator[subprocess.Popen[Any]]:
    """Start a process that is ended and waited for however the test ends: one that is left would
    fail the next test by its warning.
    """
    with subprocess.Popen([str(part) for part in command], **options) as process:
        try:
            yield process
        finally:
            process.kill()


@pytest.fixture(autouse=True)
def _float32_precision() -> Iterator[None]:
    """Put the precision of float32 products back: it is part of the identity of builds and caches,
    and torch leaves "ieee" where nothing was set when it is asked for the highest.
    """
    backends: Any = (torch.backends.mkldnn.matmul, torch.backends.cuda.matmul)
    before = [backend.fp32_precision for backend in backends]
    yield
    for backend, precision in zip(backends, before, strict=True):
        if backend.fp32_precision != precision:
            backend.fp32_precision = precision
