"""Measurements that the design rests on, and that nobody has published.

1. Does a product of half operands with float32 output run at the rate of one with half output?
2. Does the epilogue pass run at the bandwidth of a copy of the same bytes, and how is it launched?
3. Which tile, tokens by vocabulary, is best, and does a second stream help?
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any
from unittest import mock

import torch

from benchmarks.gpu.hardware import LAUNCHES
from benchmarks.measure import summary, time_one
from benchmarks.shapes import HeadShape, make_inputs
from realign_kernels import linear_logprob
from realign_kernels.backends.dispatch import kernels_of
from realign_kernels.backends.kernel_set import Tile
from realign_kernels.fused.forward import start_rows
from realign_kernels.head import LogitTransform
from realign_kernels.tiling import TileShape

Cell = tuple[str, Callable[[], dict[str, Any]]]
_BOUND = 60.0  # nats, as for float32 and bfloat16
_TILES_IN_TURN = 8


def product_cells(device: torch.device, *, tiny: bool) -> Iterator[Cell]:
    """Yield question 1: the rates of both products at tile shapes."""
    shapes = [(64, 256, 64)] if tiny else [
        (rows, columns, D)
        for rows, columns in ((1024, 8192), (4096, 8192), (4096, 32768), (16384, 8192))
        for D in (2048, 4096)
    ]  # fmt: skip
    for rows, columns, D in shapes:
        key = f"product/{rows}x{columns}x{D}"
        yield key, lambda size=(rows, columns, D): _products(device, *size)


def epilogue_cells(device: torch.device, backend: str, *, tiny: bool) -> Iterator[Cell]:
    """Yield question 2: the epilogue alone on one tile, and a copy of as many bytes."""
    shapes = [(64, 256)] if tiny else [(1024, 8192), (4096, 8192), (4096, 32768)]
    for rows, columns in shapes:
        key = f"epilogue/{rows}x{columns}"
        yield key, lambda size=(rows, columns): _epilogue(device, backend, *size)


def launch_cells(device: torch.device, backend: str) -> Iterator[Cell]:
    """Yield question 2 for Triton: the epilogue under given launch configurations."""
    if backend != "triton" or device.type != "cuda":
        return
    for rows, columns in ((1024, 8192), (4096, 8192)):
        for block, num_warps in LAUNCHES:
            key = f"launch/{rows}x{columns}/{block} by {num_warps}"
            size, launch = (rows, columns), (block, num_warps)
            yield key, lambda size=size, launch=launch: _launch(device, backend, size, launch)


def overlap_cells(device: torch.device, backend: str) -> Iterator[Cell]:
    """Yield question 3: tiles one after the other, and every second one on another stream."""
    if device.type != "cuda":
        return
    for rows, columns, D in ((1024, 8192, 4096), (4096, 8192, 4096), (4096, 8192, 2048)):
        key = f"overlap/{rows}x{columns}x{D}"
        yield key, lambda size=(rows, columns, D): _overlap(device, backend, *size)


def tile_cells(device: torch.device, backend: str, *, tiny: bool) -> Iterator[Cell]:
    """Yield question 3: the forward of a frozen head with given tile shapes."""
    widths = (4096, 8192, 16384, 32768)
    sizes = [(rows, columns) for rows in (1024, 2048, 4096, 8192) for columns in widths]
    if tiny:
        sizes = [(32, 256), (64, 512)]
    shapes = [HeadShape("tiny", 96, 64, 1003)] if tiny else [
        HeadShape("llama-3-8b", 4096, 4096, 128256),
        HeadShape("qwen2.5-vl-3b", 4096, 2048, 151936),
    ]  # fmt: skip
    for shape in shapes:
        for size in sizes:
            key = f"tile/{shape.key}/{size[0]}x{size[1]}"
            yield key, lambda shape=shape, size=size: _tile(device, backend, shape, size)


def _products(device: torch.device, rows: int, columns: int, D: int) -> dict[str, Any]:
    dtype = torch.bfloat16 if device.type == "cuda" else torch.float32
    a = torch.randn(rows, D, device=device).to(dtype)
    b = torch.randn(columns, D, device=device).to(dtype).T
    flops = 2 * rows * columns * D
    half_out = torch.empty(rows, columns, device=device, dtype=dtype)
    rates = {"same_dtype": lambda: torch.mm(a, b, out=half_out)}
    if dtype != torch.float32:
        full_out = torch.empty(rows, columns, device=device)
        rates["float32"] = lambda: torch.mm(a, b, out_dtype=torch.float32, out=full_out)
    cell: dict[str, Any] = {"status": "ok", "dtype": str(dtype).removeprefix("torch.")}
    for name, call in rates.items():
        timing = summary(time_one(call, device))
        cell[name] = timing | {"tflops_per_s": flops / timing["ms"] / 1e9}
    if "float32" in cell:
        cell["rate_kept"] = cell["same_dtype"]["ms"] / cell["float32"]["ms"]
    else:
        cell["note"] = "CPUs have no product of half operands with float32 output"
    return cell


class ResidentTile:
    """A tile of logits of std 3 with its labels, as the epilogue of a frozen head gets it."""

    def __init__(self, device: torch.device, rows: int, columns: int) -> None:
        self.source = torch.randn(rows, columns, device=device).mul_(3)
        self.labels = torch.randint(columns, (rows,), device=device)
        self.label_logits = self.source.gather(1, self.labels[:, None]).squeeze(1)
        logits = torch.empty_like(self.source)
        # on GPUs exponentials are kept in half precision beside the logits, on CPUs in their place
        half = logits.to(torch.bfloat16) if device.type == "cuda" else logits
        self.tile = Tile(
            logits=logits,
            exponentials=half,
            first_column=0,
            bias=None,
            labels=self.labels,
            transform=LogitTransform(1.0, None, 1.0),
            bound=_BOUND,
            state=start_rows(
                self.label_logits.clone(), statistics=False, tracks_top=False, releases=False
            ),
        )
        self.num_bytes = self.source.numel() * (logits.itemsize + half.itemsize)

    def refresh(self) -> None:
        """Restore logits and sums after an epilogue."""
        self.tile.logits.copy_(self.source)
        self.restart()

    def restart(self) -> None:
        """Restore only the sums, for calls that compute the logits again."""
        self.tile.state.shift.copy_(self.label_logits)
        self.tile.state.rest_sum.zero_()


def _epilogue(device: torch.device, backend: str, rows: int, columns: int) -> dict[str, Any]:
    resident, kernels = ResidentTile(device, rows, columns), kernels_of(backend)
    # the same bytes, half of them read and half written
    source = torch.empty(resident.num_bytes // 2, dtype=torch.uint8, device=device)
    target = torch.empty_like(source)
    calls = {
        "epilogue": lambda: kernels.epilogue(resident.tile),
        "copy": lambda: target.copy_(source),
    }
    cell: dict[str, Any] = {"status": "ok", "bytes": resident.num_bytes}
    for name, call in calls.items():
        timing = summary(time_one(call, device, prepare=resident.refresh))
        cell[name] = timing | {"gb_per_s": resident.num_bytes / timing["ms"] / 1e6}
    cell["bandwidth_kept"] = cell["copy"]["ms"] / cell["epilogue"]["ms"]
    return cell


def _tile(
    device: torch.device, backend: str, shape: HeadShape, size: tuple[int, int]
) -> dict[str, Any]:
    dtype = torch.bfloat16 if device.type == "cuda" else torch.float32
    inputs = make_inputs(shape, "token", dtype, device)
    hidden = inputs.hidden_states.requires_grad_()

    def call() -> torch.Tensor:
        return linear_logprob(
            hidden, inputs.lm_head_weight, inputs.labels, backend=backend, workspace_bytes=16 << 30
        )

    # nothing else can ask for a tile that is not the kernel set's choice
    kernels = kernels_of(backend)
    with (
        mock.patch.object(kernels, "LARGEST_TILE", TileShape(*size)),
        mock.patch.object(kernels, "FITS_TILES", False, create=True),
    ):
        return {"status": "ok", **summary(time_one(call, device))}


def _launch(
    device: torch.device, backend: str, size: tuple[int, int], launch: tuple[int, int]
) -> dict[str, Any]:
    from realign_kernels.backends.triton import launches

    resident, kernels = ResidentTile(device, *size), kernels_of(backend)
    with mock.patch.object(launches, "launch_of", return_value=launches.Launch(*launch)):
        times = time_one(lambda: kernels.epilogue(resident.tile), device, prepare=resident.refresh)
    timing = summary(times)
    return {"status": "ok", **timing, "gb_per_s": resident.num_bytes / timing["ms"] / 1e6}


def _overlap(device: torch.device, backend: str, rows: int, columns: int, D: int) -> dict[str, Any]:
    kernels, dtype = kernels_of(backend), torch.bfloat16
    hidden = torch.randn(rows, D, device=device).to(dtype)
    weight = (torch.randn(columns, D, device=device) * 3 / D**0.5).to(dtype)
    residents = [ResidentTile(device, rows, columns) for _ in range(2)]
    sums = [torch.zeros(rows, D, device=device) for _ in range(2)]
    streams = [torch.cuda.current_stream(device), torch.cuda.Stream(device)]

    def one(number: int) -> None:
        tile = residents[number].tile
        kernels.product(tile.logits, hidden, weight.T, adds=False)
        kernels.epilogue(tile)
        assert tile.exponentials is not None
        kernels.product(sums[number], tile.exponentials, weight, adds=True)

    def in_turn() -> None:
        for _ in range(_TILES_IN_TURN):
            one(0)

    def side_by_side() -> None:
        streams[1].wait_stream(streams[0])
        for number in range(_TILES_IN_TURN):
            with torch.cuda.stream(streams[number % 2]):
                one(number % 2)
        streams[0].wait_stream(streams[1])

    def refresh() -> None:
        for resident in residents:
            resident.refresh()

    calls = {"one_stream": in_turn, "two_streams": side_by_side}
    cell: dict[str, Any] = {"status": "ok", "tiles": _TILES_IN_TURN}
    for name, call in calls.items():
        cell[name] = summary(time_one(call, device, prepare=refresh))
    return cell
