"""Whole losses on a CPU: ours, PyTorch's, and those of other libraries."""

from __future__ import annotations

from typing import Any

import pytest

from benchmarks.head.providers import MODES, providers_of
from benchmarks.shapes import shapes_for

SHAPES = shapes_for("cpu")
OTHERS = [name for name in providers_of("dpo") if name != "ours_dpo"]


@pytest.mark.parametrize("mode", MODES[1:])
@pytest.mark.parametrize("shape", SHAPES, ids=lambda shape: shape.key)
def test_ours(measure: Any, shape: Any, mode: str) -> None:
    measure("ours_dpo", mode, shape)


@pytest.mark.parametrize("mode", MODES[1:])
@pytest.mark.parametrize("name", OTHERS)
def test_others(measure: Any, name: str, mode: str) -> None:
    measure(name, mode, SHAPES[0])
