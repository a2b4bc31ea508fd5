"""Backends, libraries and processes for the tests of the kernels, which use one thread each."""

from __future__ import annotations

import functools
import os
import shutil
import subprocess
import sys
import tempfile
from contextlib import ExitStack
from pathlib import Path

import pytest
import torch

from realign_kernels.backends import cpu
from realign_kernels.backends.dispatch import kernels_of
from realign_kernels.tiling import TileShape
from tests.conftest import running

DEVICE = os.environ.get("REALIGN_TEST_DEVICE", "cpu")  # cuda: see benchmarks/gpu/native_tests.py

# The plain kernels, and those of the device that tests run on.
BACKENDS = ["eager", "cpu" if DEVICE == "cpu" else "triton"]

torch.set_num_threads(1)
if DEVICE != "cpu":
    torch.set_default_device(DEVICE)


@pytest.fixture(autouse=True)
def seed():
    """Seed the global generator, so that draws do not depend on earlier tests."""
    torch.manual_seed(0)


@pytest.fixture(scope="module", params=BACKENDS)
def each_backend(request):
    """Run with each backend where a call does not name one."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(
            "realign_kernels.backends.dispatch.auto_backend", lambda device_type: request.param
        )
        yield request.param


@pytest.fixture
def run_two_ranks(tmp_path):
    """Run a file as the two processes of a group.

    The script is given its rank, a file by which the two find each other, and the arguments.
    """

    def run(script, *arguments, warnings="error"):
        environment = dict(os.environ, PYTHONPATH=os.pathsep.join(filter(None, sys.path)))
        command = [sys.executable, "-W", warnings, script]
        rendezvous = tmp_path / "rendezvous"
        with ExitStack() as stack:
            ranks = [
                stack.enter_context(
                    running(
                        [*command, rank, rendezvous, *arguments],
                        env=environment,
                        stderr=subprocess.PIPE,
                        text=True,
                    )
                )
                for rank in range(2)
            ]
            for process in ranks:
                _, stderr = process.communicate(timeout=600)
                assert process.returncode == 0, stderr

    return run


@pytest.fixture
def use_library(monkeypatch):
    """Make the CPU backend load another library."""

    def use(path):
        monkeypatch.setattr(cpu, "library_path", lambda: str(path))
        # Clearing the cache would not do: another fixture may have replaced it for a whole module.
        monkeypatch.setattr(cpu, "_library", functools.cache(lambda: cpu._load(str(path))))

    return use


def product_sets():
    """Return the ways to multiply bfloat16 that this machine and this library have."""
    if cpu.library_path() is None:
        return []
    with pytest.MonkeyPatch.context() as patch, tempfile.TemporaryDirectory() as folder:
        return [
            name
            for name in ("portable", "avx512", "amx")
            if choose_products(name, patch, Path(folder)) == name
        ]


def choose_products(name, monkeypatch, folder):
    """Load a copy of the library and request instructions, which a library chooses only once."""
    library = cpu._load(str(shutil.copy(cpu.library_path(), Path(folder) / f"{name}.so")))
    monkeypatch.setattr(cpu, "_library", functools.cache(lambda: library))
    with monkeypatch.context() as patch:
        patch.setenv("REALIGN_CPU_PRODUCTS", name)
        return cpu.product_set()


@pytest.fixture(scope="module", params=product_sets())
def each_product_set(request, tmp_path_factory):
    """Run with every way to multiply bfloat16 that this machine has."""
    with pytest.MonkeyPatch.context() as patch:
        folder = tmp_path_factory.mktemp("products")
        assert choose_products(request.param, patch, folder) == request.param
        yield request.param


@pytest.fixture
def poison_empty(monkeypatch):
    """Fill uninitialised memory with NaN, so that a test fails where it is read."""

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
    """Use tiles of 4 rows by 16 columns, so that small inputs cross their edges."""
    for name in BACKENDS:
        monkeypatch.setattr(kernels_of(name), "LARGEST_TILE", TileShape(4, 16))
