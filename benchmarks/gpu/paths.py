"""Measurements to choose between implementations: where the epilogue runs, what a call launches.

1. Logits of a tile by a BLAS and an epilogue after it, or by one kernel with the epilogue inside?
2. How many kernels does one pair launch, how long does the host take, and how long the device?
"""

from __future__ import annotations

import time
from collections import Counter
from collections.abc import Callable, Iterable, Iterator
from typing import Any

import torch
from torch.autograd import DeviceType
from torch.profiler import ProfilerActivity, profile

from benchmarks.gpu.questions import ResidentTile
from benchmarks.gpu.session import Measure
from benchmarks.head.launches import calls
from benchmarks.measure import quantile, summary, time_one
from realign_kernels.backends.dispatch import kernels_of

_CALLS = 30  # of which the host's time is the median
_NUM_ROWS = (360, 1020)  # three answers of 120 tokens; a micro-batch of nearly three pairs


def path_cells(device: torch.device, backend: str, *, tiny: bool) -> Iterator[tuple[str, Measure]]:
    """Yield measurements of tiles by both paths; a backend without own products has only one."""
    if getattr(kernels_of(backend), "PRODUCT_KERNELS", None) is None:
        return
    shapes = [(64, 256, 64)] if tiny else [
        (rows, columns, D)
        for rows, columns in ((512, 65536), (1024, 32768), (4096, 8192))
        for D in (2048, 4096)
    ]  # fmt: skip
    for rows, columns, D in shapes:
        key = f"path/{rows}x{columns}x{D}"
        yield key, lambda size=(rows, columns, D): _both_paths(device, backend, *size)


def pair_cells(device: torch.device, backend: str, *, tiny: bool) -> Iterator[tuple[str, Measure]]:
    """Yield measurements of one call of every kind, forward and backward."""
    for num_rows in (12,) if tiny else _NUM_ROWS:
        for name in calls(num_rows, 1):
            key = f"pair/{num_rows}/{name}"
            vocabulary, hidden_size = (512, 64) if tiny else (32064, 4096)
            options = {"hidden_size": hidden_size, "device": device, "backend": backend}
            yield (
                key,
                lambda num_rows=num_rows, name=name, vocabulary=vocabulary, options=options: (
                    _one_pair(calls(num_rows, vocabulary, **options)[name], device)
                ),
            )


def _both_paths(
    device: torch.device, backend: str, rows: int, columns: int, D: int
) -> dict[str, Any]:
    kernels: Any = kernels_of(backend)
    dtype = torch.bfloat16 if device.type == "cuda" else torch.float32
    hidden = torch.randn(rows, D, device=device).to(dtype)
    weight = (torch.randn(columns, D, device=device) * 3 / D**0.5).to(dtype)
    resident = ResidentTile(device, rows, columns)
    labels = resident.labels
    logits = (hidden.float() * weight[labels].float()).sum(-1)
    resident.label_logits.copy_(logits)
    tile = resident.tile

    def after() -> None:
        kernels.product(tile.logits, hidden, weight.T, adds=False)
        kernels.epilogue(tile)

    def inside() -> None:
        kernels.PRODUCT_KERNELS.fused_product(tile, hidden, weight)

    cell: dict[str, Any] = {"status": "ok"}
    sums = {}
    for name, call in {"blas_and_epilogue": after, "epilogue_inside": inside}.items():
        resident.restart()
        call()
        sums[name] = (tile.state.shift + tile.state.rest_sum.log()).double()
        cell[name] = summary(time_one(call, device, prepare=resident.restart))
    # a wrong path is fast: both must have summed the same
    cell["largest_difference"] = (
        (sums["epilogue_inside"] - sums["blas_and_epilogue"]).abs().max().item()
    )
    assert cell["largest_difference"] < 1e-2, f"paths differ by {cell['largest_difference']:.1e}"
    flops = 2 * rows * columns * D
    cell["inside_tflops_per_s"] = flops / cell["epilogue_inside"]["ms"] / 1e9
    cell["times_blas"] = cell["epilogue_inside"]["ms"] / cell["blas_and_epilogue"]["ms"]
    return cell


def _one_pair(call: Callable[[], object], device: torch.device) -> dict[str, Any]:
    for _ in range(3):
        call()
    is_gpu = device.type == "cuda"
    host = []
    for _ in range(_CALLS):
        if is_gpu:
            torch.cuda.synchronize(device)
        started = time.perf_counter()
        call()  # returns when everything is in the queue
        host.append(1e3 * (time.perf_counter() - started))
    cell: dict[str, Any] = {
        "status": "ok",
        "host_ms": quantile(torch.tensor(host), 0.5),
        "in_all": summary(time_one(call, device)),
    }
    activities = [ProfilerActivity.CPU, *([ProfilerActivity.CUDA] if is_gpu else [])]
    with profile(activities=activities) as profiled:
        call()
        if is_gpu:
            torch.cuda.synchronize(device)
    if not is_gpu:
        return cell
    return cell | launches_of(profiled.events() or [])


def launches_of(events: Iterable[Any]) -> dict[str, Any]:
    """Return the launches and device time of a profile, as a cell that fails without kernels."""
    events = [e for e in events if e.device_type == DeviceType.CUDA and not e.is_user_annotation]
    names = Counter(event.name for event in events)
    copies = sum(count for name, count in names.items() if name.startswith("Memcpy"))
    fills = sum(count for name, count in names.items() if name.startswith("Memset"))
    if names.total() == copies + fills:
        return {"status": "failed", "reason": "the profile has no kernel"}
    busy_ms = sum(event.self_device_time_total for event in events) / 1e3
    return {
        "launches": names.total(),
        "copies": copies,
        "device_ms": float(busy_ms),
        "kernels": dict(names.most_common()),
    }
