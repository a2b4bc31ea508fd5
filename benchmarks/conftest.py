"""Fixtures of the benchmarks that pytest runs: `pytest --benchmark` or `pytest benchmarks`."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch

from benchmarks.head.providers import MODES, PROVIDERS, why_not
from benchmarks.measure import exact, measure_cell
from benchmarks.promises import DTYPES
from benchmarks.shapes import HeadShape, make_inputs

_ROUNDS = 5
_LINES = pytest.StashKey[list[str]]()


@pytest.fixture(autouse=True)
def _two_threads() -> None:
    torch.set_num_threads(2)


def pytest_configure(config: pytest.Config) -> None:
    """Create the list of the lines that are printed at the end."""
    config.stash[_LINES] = []


def pytest_terminal_summary(terminalreporter: Any, config: pytest.Config) -> None:
    """Print errors and memory beside each time, which do not fit pytest-benchmark's table."""
    lines = config.stash[_LINES]
    if lines:
        terminalreporter.section("beside one product hidden @ W.T, timed in turn")
        for line in lines:
            terminalreporter.line(line)


@pytest.fixture
def measure(benchmark: Any, request: pytest.FixtureRequest) -> Callable[..., None]:
    """Time one provider, and put its errors and memory into ``extra_info``."""

    def run(name: str, mode: str, shape: HeadShape, dtype: str = "float32") -> None:
        provider, device = PROVIDERS[name], torch.device("cpu")
        reason = why_not(provider, device, DTYPES[dtype])
        if reason is not None:
            pytest.skip(f"{name}: {reason}")
        assert mode in MODES
        inputs = make_inputs(shape, provider.job, DTYPES[dtype], device)
        truth = exact(inputs, provider.job)
        cell = measure_cell(provider, mode, shape, inputs, truth, repeats=2)
        benchmark.extra_info.update({**shape._asdict(), "dtype": dtype, **cell})
        benchmark.group = f"{provider.job} {mode} {shape.key} {dtype}"
        benchmark.pedantic(lambda: provider.run(mode, inputs), rounds=_ROUNDS)
        errors = ", ".join(f"{kind} {error:.1e}" for kind, error in cell["errors"].items())
        request.config.stash[_LINES].append(
            f"{benchmark.group} {name}: {cell['ms']:.1f} ms, {cell['ratio_to_gemm']:.2f} products; "
            f"errors {errors}; peak {cell['peak_bytes'] / 2**20:.0f} MiB"
        )
        assert cell["errors"]["logp_max"] < 1e-3  # a wrong result gets no time

    return run
