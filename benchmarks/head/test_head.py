"""The head on a CPU: providers by mode, and the C++ epilogue alone."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from benchmarks.gpu.questions import ResidentTile
from benchmarks.head.providers import MODES, providers_of
from benchmarks.shapes import shapes_for
from realign_kernels.backends.dispatch import kernels_of, resolve_backend

SHAPES = shapes_for("cpu")
OTHERS = [name for name in providers_of("token") if name != "ours"]
ROWS, COLUMNS = 512, 2048  # the library's own tile on CPUs


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("shape", SHAPES, ids=lambda shape: shape.key)
def test_ours(measure: Any, shape: Any, mode: str) -> None:
    measure("ours", mode, shape)


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("name", OTHERS)
def test_others(measure: Any, name: str, mode: str) -> None:
    measure(name, mode, SHAPES[0])


@pytest.mark.parametrize("backend", ["cpu", "eager"])
def test_epilogue(benchmark: Any, backend: str) -> None:
    if resolve_backend("auto", "cpu") != "cpu":
        pytest.skip("the C++ kernels are not installed")
    resident = ResidentTile(torch.device("cpu"), ROWS, COLUMNS)
    call = kernels_of(backend).epilogue
    benchmark.group = f"epilogue {ROWS} x {COLUMNS}"
    benchmark.pedantic(call, args=(resident.tile,), setup=resident.refresh, rounds=20)

    resident.refresh()
    call(resident.tile)
    exact = (resident.source.double() - resident.label_logits[:, None].double()).exp()
    exact.scatter_(1, resident.labels[:, None], 0.0)
    relative = (resident.tile.state.rest_sum / exact.sum(1) - 1).abs().max().item()
    gigabytes = resident.num_bytes / benchmark.stats.stats.median / 1e9
    benchmark.extra_info.update(
        bytes=resident.num_bytes,
        peak_bytes=0 if backend == "cpu" else resident.num_bytes // COLUMNS,
        relative_error=relative,
        gb_per_s=gigabytes,
    )
    assert relative < 1e-5
