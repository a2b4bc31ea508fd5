"""`pytest --benchmark` runs the benchmarks; without it they are not collected."""

from __future__ import annotations

import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parent
if str(ROOT) not in sys.path:
    sys.path.append(str(ROOT))  # for `benchmarks`; at the end: an installed package goes first


def pytest_addoption(parser: pytest.Parser) -> None:
    """Add the option."""
    parser.addoption(
        "--benchmark", action="store_true", help="run the benchmarks instead of the tests"
    )


def pytest_configure(config: pytest.Config) -> None:
    """Collect benchmarks where no path was given."""
    if not config.getoption("--benchmark"):
        return
    if not config.pluginmanager.hasplugin("benchmark"):
        raise pytest.UsageError("--benchmark needs pytest-benchmark: pip install '.[bench]'.")
    if config.args_source is not pytest.Config.ArgsSource.ARGS:
        config.args[:] = [str(ROOT / "benchmarks")]
