"""Checks that need a GPU, against float64 or bit by bit, before any timing.

They are tensors beyond 2^31 elements, a thousand repeats, the checks of
:mod:`benchmarks.gpu.callers`, and every launch configuration.  On a CPU the same code runs at tiny
sizes.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace
from typing import NamedTuple
from unittest import mock

import torch
from torch import Tensor

from benchmarks.gpu.callers import caller_checks, draw
from benchmarks.gpu.checks import CASES, Case, check_cases, check_of
from benchmarks.gpu.session import Check
from benchmarks.promises import GRAD_FLOOR, assert_logps, relative_error
from realign_kernels import linear_logprob
from realign_kernels.testing import HeadInputs, dense_logprob

REPEATS = 1000
# elements that a program handles at a time, and its warps
LAUNCHES = (
    (64, 1), (256, 1), (256, 2), (512, 2), (512, 4), (1024, 2), (1024, 4), (1024, 8), (2048, 4),
    (2048, 8), (4096, 8), (4096, 16), (8192, 16),
)  # fmt: skip
_IN_FLOAT32 = ((64, 1), (1024, 4), (8192, 16))


class Large(NamedTuple):
    """Sizes of which one product exceeds 2^31."""

    name: str
    N: int
    V: int
    D: int
    is_frozen: bool
    layout: str = "contiguous"


LARGE = (
    Large("N x V, stashed", 16384, 152064, 64, False),
    Large("N x V, frozen", 32768, 152064, 64, True),
    Large("V x D", 96, 262208, 8448, False),
    Large("V x D, transposed", 96, 262208, 8448, True, "transposed"),
    Large("N x D", 262144, 1031, 8448, True),
    Large("strides of rows", 65536, 1031, 8448, True, "strided"),
)
REPEATED = (  # N, V, D, is_frozen
    (1, 1031, 64, True), (64, 32064, 256, True), (257, 4099, 192, False), (512, 32064, 512, True),
    (512, 32064, 512, False), (1024, 8192, 1024, True), (600, 17003, 67, False),
    (2048, 2049, 512, False),
)  # fmt: skip


def hardware_checks(device: torch.device, backend: str, *, tiny: bool = False) -> Iterator[Check]:
    """Yield all checks, the quickest to fail first.

    Launches come last: they compile every kernel again, which takes minutes.
    """
    for large in LARGE:
        sizes = Large(large.name, 96, 301, 40, *large[4:]) if tiny else large
        yield check_of(f"beyond 2^31, {large.name}", _large, device, sizes, backend)
    for N, V, D, is_frozen in REPEATED[:3] if tiny else REPEATED:
        name = f"repeats, {N} x {V} x {D}, {'frozen' if is_frozen else 'trainable'}"
        count = 3 if tiny else REPEATS
        yield check_of(name, _repeats, device, (N, V, D), is_frozen, count, backend)
    yield from caller_checks(device, backend)
    yield from _launches(device, backend, tiny=tiny)


def _large(device: torch.device, sizes: Large, backend: str) -> None:
    """Compare the first and the last rows and their gradients with float64."""
    inputs = draw(device, sizes.N, sizes.V, sizes.D, layout=sizes.layout)
    if sizes.is_frozen:
        inputs.lm_head_weight.requires_grad_(False)
    logps = inputs.call(linear_logprob, backend=backend, stash_bytes=8 << 30)
    upstream = torch.linspace(-1, 2, len(logps), device=device)
    logps.backward(upstream)
    for rows in (slice(0, 48), slice(-48, None)):
        _compare_rows(inputs, logps, upstream, rows)
    if not sizes.is_frozen:
        error = relative_error(inputs.lm_head_weight.grad, _weight_gradient(inputs, upstream))
        assert error <= GRAD_FLOOR["bfloat16"], f"gradient of lm_head_weight: {error:.2e}"


def _compare_rows(inputs: HeadInputs, logps: Tensor, upstream: Tensor, rows: slice) -> None:
    # apart, so that the head in float64, of 18 GB, is gone before the next one
    part = replace(
        inputs,
        hidden_states=inputs.hidden_states.detach()[rows],
        lm_head_weight=inputs.lm_head_weight.detach(),
        labels=inputs.labels[rows],
    )
    assert_logps(logps[rows], part, "bfloat16")
    hidden = part.hidden_states.double().requires_grad_()
    exact = replace(part, hidden_states=hidden, lm_head_weight=part.lm_head_weight.double())
    dense_logprob(exact).backward(upstream[rows].double())
    grad = inputs.hidden_states.grad
    assert grad is not None
    error = relative_error(grad[rows], hidden.grad)
    assert error <= GRAD_FLOOR["bfloat16"], f"gradient of rows {rows}: {error:.2e}"


def _weight_gradient(inputs: HeadInputs, upstream: Tensor, rows: int = 1024) -> Tensor:
    """Return the gradient in float64, in blocks of rows, since all logits would not fit."""
    weight = inputs.lm_head_weight.detach().double()
    total = torch.zeros_like(weight)
    for start in range(0, len(upstream), rows):
        block = slice(start, start + rows)
        hidden = inputs.hidden_states.detach()[block].double()
        grad = (hidden @ weight.T).softmax(-1).neg_()
        grad[torch.arange(len(grad), device=grad.device), inputs.labels[block]] += 1
        total.addmm_(grad.mul_(upstream[block, None].double()).T, hidden)
    return total


def _repeats(
    device: torch.device,
    sizes: tuple[int, int, int],
    is_frozen: bool,
    count: int,
    backend: str,
) -> None:
    """Check that equal inputs give equal bits in all repeats."""
    inputs = draw(device, *sizes)
    inputs.lm_head_weight.requires_grad_(not is_frozen)
    needed = [tensor for tensor in inputs.tensors if tensor.requires_grad]
    first: list[Tensor] = []
    differs = torch.zeros((), dtype=torch.int64, device=device)
    for _ in range(count):
        logps = inputs.call(linear_logprob, backend=backend)
        found = [logps.detach(), *torch.autograd.grad(logps.sum(), needed)]
        first = first or found
        same = [(one == other).all() for one, other in zip(first, found, strict=True)]
        differs += ~torch.stack(same).all()
    assert int(differs) == 0, f"{int(differs)} of {count} repeats differ"


def _launches(device: torch.device, backend: str, *, tiny: bool) -> Iterator[Check]:
    """Yield a check of every launch configuration, or one if the backend has none."""
    cases = [case for case in CASES if case.name in ("ragged", "LoRA and bias", "softcap")]
    if backend != "triton" or tiny:
        yield check_of("launch as chosen", check_cases, device, cases[:1], "float32", backend)
        return
    for block, num_warps in LAUNCHES:
        # kernels compute in float32 whatever the operands are: three sizes are enough of those
        dtypes = ["bfloat16", *(["float32"] if (block, num_warps) in _IN_FLOAT32 else [])]
        for dtype in dtypes:
            name = f"{dtype} launch of {block} by {num_warps} warps"
            yield check_of(name, _launched, device, cases, dtype, backend, (block, num_warps))


def _launched(
    device: torch.device, cases: list[Case], dtype: str, backend: str, launch: tuple[int, int]
) -> None:
    """Check that a launch configuration is within the promised bounds."""
    from realign_kernels.backends.triton import launches

    with mock.patch.object(launches, "launch_of", return_value=launches.Launch(*launch)):
        check_cases(device, cases, dtype, backend)
