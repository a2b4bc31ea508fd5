"""Settings that all tests share, and the list of the tests that were collected."""

from __future__ import annotations

import gc
import os
import subprocess
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any

# set before the libraries that read these variables are imported
os.environ["HF_HUB_OFFLINE"] = "1"
os.environ["TOKENIZERS_PARALLELISM"] = "false"
os.environ.pop("HF_ENDPOINT", None)
os.environ.pop("TRANSFORMERS_VERBOSITY", None)
os.environ.pop("DATASETS_VERBOSITY", None)
# tests run in parallel and start processes of their own: each gets one thread, which does not spin
os.environ.setdefault("OMP_NUM_THREADS", "1")
os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")
# a GPU is hidden unless tests are asked to use it, and its kernels run in Triton's interpreter
if "REALIGN_TEST_DEVICE" not in os.environ:
    os.environ |= {"CUDA_VISIBLE_DEVICES": "", "HIP_VISIBLE_DEVICES": ""}
    os.environ.setdefault("TRITON_INTERPRET", "1")

import pytest
import torch

# beginnings of the names of variables that change what a test, or a program that it starts, does
FOREIGN = (
    *("MAKE", "MFLAGS", "GNUMAKEFLAGS"),  # set by `make test`
    *("GIT_DIR", "GIT_WORK_TREE", "GIT_INDEX_FILE", "GIT_PREFIX"),  # set where Git runs a hook
    *("COLUMNS", "LINES", "FORCE_COLOR", "NO_COLOR", "CLICOLOR", "TTY_"),  # the terminal
    *("RANK", "LOCAL_RANK", "WORLD_SIZE", "LOCAL_WORLD_SIZE", "MASTER_", "ACCELERATE_", "FSDP_"),
    *("HTTP_PROXY", "HTTPS_PROXY", "ALL_PROXY"),  # the servers of tests are on this machine
    *("HF_TOKEN", "OPENAI_API_KEY", "OPENAI_BASE_URL", "PYTHONWARNINGS", "REALIGN_CHECK"),
)

# all tests that were found, including those that -m deselects
FOUND = pytest.StashKey[list[pytest.Item]]()


def pytest_configure() -> None:
    """Make the result of the tests independent of the caller's environment.

    The variables are removed here and not at import, since processes that tests start import this
    module too, and are given some of them.
    """
    for name in [name for name in os.environ if name.upper().startswith(FOREIGN)]:
        del os.environ[name]


@pytest.hookimpl(tryfirst=True)
def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    """Remember all tests that were found, before some of them are deselected."""
    config.stash[FOUND] = [*items]


def pytest_collection_finish() -> None:
    """Exclude all objects that exist after collection from later searches for garbage.

    Each training run asks for such a search, and visiting the objects of thousands of tests takes a
    second.
    """
    gc.collect()
    gc.freeze()


@pytest.fixture(autouse=True, scope="session")
def _one_thread() -> None:
    """Let torch use one thread, which also makes its sums repeatable."""
    torch.set_num_threads(1)


@contextmanager
def running(command: Sequence[object], **options: Any) -> Iterator[subprocess.Popen[Any]]:
    """Start a process, and end it and wait for it however the test ends.

    A process that is left behind would warn later, which would fail another test.
    """
    with subprocess.Popen([str(part) for part in command], **options) as process:
        try:
            yield process
        finally:
            process.kill()


@pytest.fixture(autouse=True)
def _float32_precision() -> Iterator[None]:
    """Restore the precision of float32 products after each test.

    It is part of the identity of builds and caches, and a request for the highest precision leaves
    "ieee" where nothing was set before.
    """
    backends: Any = (torch.backends.mkldnn.matmul, torch.backends.cuda.matmul)
    before = [backend.fp32_precision for backend in backends]
    yield
    for backend, precision in zip(backends, before, strict=True):
        if backend.fp32_precision != precision:
            backend.fp32_precision = precision
