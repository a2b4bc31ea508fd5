"""Examples in docstrings that are written as sessions are true."""

from __future__ import annotations

import doctest
import importlib

import pytest


@pytest.mark.parametrize("module", ["cells", "labels", "diagnosis"])
def test_examples_run(module: str) -> None:
    result = doctest.testmod(importlib.import_module(f"realign_kernels.{module}"))
    assert result.failed == 0
    assert result.attempted >= 2
