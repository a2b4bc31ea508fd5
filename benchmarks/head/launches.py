"""Kernels that one call would launch on a GPU, and the host's time for it, found without a GPU.

``python -m benchmarks.head.launches`` runs the Triton backend on CPU tensors with kernels and
products that only count their calls, and PyTorch's profiler counts the operators that would launch
a kernel each.  Host time is thread CPU time, without the cost of launching.  Copies from the host
to a device cannot be seen on a CPU.
"""

from __future__ import annotations

import argparse
import ctypes
import functools
import os
import statistics
import sys
import time
from array import array
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field
from typing import Any
from unittest import mock

import torch
from torch import Tensor
from torch.profiler import ProfilerActivity, profile

from realign_kernels import linear_logprob, rdpo_loss

# Operators that launch nothing on a device: they view memory, allocate it, or read sizes.  A
# conversion that changes anything calls `copy_`, and scalars of `where` stay on the host.
_FREE_NAMES = (
    "view slice t T numpy_T select unsqueeze squeeze expand detach detach_ alias transpose "
    "as_strided unbind split _unsafe_view reshape empty empty_like new_empty empty_strided "
    "new_empty_strided lift_fresh is_same_size view_as permute narrow result_type resize_ set_ "
    "item is_nonzero resolve_conj resolve_neg flatten data_ptr to as_strided_ scalar_tensor"
)
_FREE = frozenset(_FREE_NAMES.split())
# Operators that make the host wait for a device.
_WAITS = frozenset(["_local_scalar_dense", "nonzero", "equal"])
_EPILOGUES = frozenset(["_epilogue_kernel", "_replay_kernel"])
HIDDEN_SIZE = 64  # no count depends on it


@dataclass
class Launches:
    """Launches of one call, by kind."""

    operators: Counter[str] = field(default_factory=Counter)  # of PyTorch
    kernels: Counter[str] = field(default_factory=Counter)  # of this package, without epilogues
    epilogues: int = 0
    products: int = 0
    waits: int = 0
    host_ms: float = 0.0

    def clear(self) -> None:
        """Reset the counts of the stubs."""
        self.kernels.clear()
        self.epilogues = self.products = 0

    @property
    def small(self) -> int:
        """Number of launches except products and epilogues."""
        return self.operators.total() + self.kernels.total()


class _Kernel:
    """Stub of a Triton kernel, which counts launches and has the effects that callers rely on."""

    def __init__(self, name: str, arg_names: list[str], counted: Launches) -> None:
        self.name, self.arg_names, self.counted = name, arg_names, counted

    def __getitem__(self, grid: tuple[int, ...]) -> Callable[..., None]:
        return self.launch

    def launch(self, *arguments: Any, **options: Any) -> None:
        if self.name in _EPILOGUES:
            self.counted.epilogues += 1
        else:
            self.counted.kernels[self.name] += 1
        effect = _EFFECTS.get(self.name)
        if effect is not None:
            effect(**dict(zip(self.arg_names, arguments, strict=False)))


def _find_rows(
    positions_ptr: Tensor, fits_ptr: Tensor, count_ptr: Tensor | None, num_positions: int, **_: Any
) -> None:
    """Report that every position is scored, and that nothing is wrong."""
    _fill(positions_ptr, _ascending(num_positions))
    if count_ptr is not None:
        _fill(count_ptr, _repeated("i", num_positions, 1))
    _fill(fits_ptr, _repeated("b", 1, 2))


def _sum_sequences(
    counts_ptr: Tensor, fits_ptr: Tensor, num_tokens: int, num_sequences: int, **_: Any
) -> None:
    """Report that all sequences have the same number of tokens, and that nothing is wrong."""
    _fill(counts_ptr, _repeated("q", num_tokens // num_sequences, num_sequences))
    _fill(fits_ptr, _repeated("b", 1, 2))


@functools.cache
def _ascending(stop: int) -> array[int]:
    return array("q", range(stop))


@functools.cache
def _repeated(kind: str, number: int, count: int) -> array[int]:
    return array(kind, [number] * count)


def _fill(tensor: Tensor, numbers: array[int]) -> None:
    """Set a tensor without the profiler seeing it."""
    assert tensor.nbytes == numbers.itemsize * len(numbers)
    ctypes.memmove(tensor.data_ptr(), numbers.buffer_info()[0], tensor.nbytes)


_EFFECTS: dict[str, Callable[..., None]] = {
    "_find_rows_kernel": _find_rows,
    "_sum_sequences_kernel": _sum_sequences,
}


@contextmanager
def _counting() -> Iterator[Launches]:
    """Replace kernels and products with counters."""
    from triton.runtime.interpreter import InterpretedFunction
    from triton.runtime.jit import JITFunction

    from realign_kernels.backends import triton as kernels

    counted = Launches()

    def product(out: Tensor, a: Tensor, b: Tensor, *, adds: bool) -> None:
        counted.products += 1

    with ExitStack() as stack:
        stack.enter_context(mock.patch.dict(os.environ, TRITON_INTERPRET="1"))
        stack.enter_context(mock.patch.object(kernels, "product", product))
        for name, module in list(sys.modules.items()):
            if not name.startswith(f"{kernels.__name__}."):
                continue
            for attribute, value in list(vars(module).items()):
                is_kernel = isinstance(value, JITFunction | InterpretedFunction)
                if is_kernel and attribute.endswith("_kernel"):
                    stub = _Kernel(attribute, value.arg_names, counted)
                    stack.enter_context(mock.patch.object(module, attribute, stub))
        yield counted


def count(call: Callable[[], object], *, repeats: int = 0) -> Launches:
    """Return the launches of a call, and the host's median time over some repeats."""
    with _counting() as counted:
        call()  # fills caches
        counted.clear()
        with profile(activities=[ProfilerActivity.CPU], acc_events=True) as profiled:
            call()
        result = Launches(
            kernels=counted.kernels.copy(),
            epilogues=counted.epilogues,
            products=counted.products,
        )
        for event in profiled.events() or []:
            _count_event(event, result)
        times = []
        for _ in range(repeats):
            start = time.thread_time()
            call()
            times.append(time.thread_time() - start)
        if times:
            result.host_ms = statistics.median(times) * 1e3
    return result


def _count_event(event: Any, result: Launches) -> None:
    """Count an event of the profiler if it would launch a kernel or wait for a device."""
    name = event.name.removeprefix("aten::")
    if name == event.name or name in _FREE:
        return
    parent = event.cpu_parent
    while parent is not None and parent.name != "aten::_assert_async":
        parent = parent.cpu_parent
    if parent is not None:
        return  # on a device an assertion is one kernel, and nothing waits for it
    inner = {child.name.removeprefix("aten::") for child in event.cpu_children}
    if name in _WAITS:
        result.waits += 1
    elif name == "_assert_async" or inner <= _FREE:
        result.operators[name] += 1


def calls(
    num_rows: int,
    vocabulary: int,
    *,
    hidden_size: int = HIDDEN_SIZE,
    device: torch.device | str = "cpu",
    backend: str = "triton",
) -> dict[str, Callable[[], object]]:
    """Return calls by name: three cells of two pairs, forward and backward, all tokens scored."""
    length = num_rows // 6
    lengths = torch.full((3, 2), length)  # known to the host
    with torch.device(device):
        hidden = torch.randn(6, length, hidden_size).bfloat16()
        weight = torch.randn(vocabulary, hidden_size).mul_(3 / hidden_size**0.5).bfloat16()
        labels = torch.zeros(6, length, dtype=torch.int64)
        ids = torch.arange(6).repeat_interleave(length)
        ref_logps = torch.zeros(3, 2)
        slope, slopes = torch.ones(()), torch.ones(6, length)

    def loss(
        *, packed: bool = False, knows: bool = True, memory: str = "auto", trains: bool = False
    ) -> Callable[[], object]:
        def call() -> object:
            h = hidden.detach().requires_grad_()
            w = weight.detach().requires_grad_(trains)
            shaped = (h.view(-1, hidden_size), w, labels.view(-1)) if packed else (h, w, labels)
            output = rdpo_loss(
                *shaped, ref_logps,
                sequence_ids=ids if packed else None, sequence_lengths=lengths if knows else None,
                backend=backend, memory=memory,
            )  # fmt: skip
            return torch.autograd.grad(output.loss, (h, w) if trains else h, slope)

        return call

    def scores(num_scored: int | None) -> Callable[[], object]:
        def call() -> object:
            h = hidden.detach().requires_grad_()
            logps = linear_logprob(h, weight, labels, num_scored=num_scored, backend=backend)
            return torch.autograd.grad(logps, h, slopes)

        return call

    return {
        "rdpo_loss, padded": loss(),
        "rdpo_loss, padded, lengths unknown": loss(knows=False),
        "rdpo_loss, packed": loss(packed=True),
        "rdpo_loss, packed, lengths unknown": loss(packed=True, knows=False),
        "linear_logprob": scores(labels.numel()),
        "linear_logprob, number unknown": scores(None),
        "rdpo_loss, stash": loss(trains=True, memory="stash"),
        "rdpo_loss, tile": loss(trains=True, memory="tile"),
    }


def main(arguments: Sequence[str] | None = None) -> int:
    """Count the launches and print a table."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--rows", nargs="+", type=int, default=[256, 1024])
    parser.add_argument("--vocabulary", type=int, default=32064)
    parser.add_argument("--repeats", type=int, default=31)
    parser.add_argument("--names", action="store_true", help="list the launches of every call")
    options = parser.parse_args(arguments)
    torch.set_num_threads(1)
    print(f"| forward and backward, V {options.vocabulary} | N | small | of it ours | products "
          "| epilogues | waits | host ms |")  # fmt: skip
    print("|---|---|---|---|---|---|---|---|")
    for num_rows in options.rows:
        for name, call in calls(num_rows, options.vocabulary).items():
            found = count(call, repeats=options.repeats)
            print(
                f"| {name} | {num_rows} | {found.small} | {found.kernels.total()} "
                f"| {found.products} | {found.epilogues} | {found.waits} | {found.host_ms:.2f} |"
            )
            if options.names:
                print("   ", dict(found.operators.most_common()), dict(found.kernels))
    return 0


if __name__ == "__main__":
    os.environ["TRITON_INTERPRET"] = "1"  # allows CPU tensors; no kernel is run
    sys.exit(main())
