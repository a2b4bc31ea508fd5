"""Checks that only a GPU allows, against float64 or bit by bit, before any timing.

Tensors beyond 2^31 elements, a thousand repeats, every launch configuration, no wait of the host,
CUDA graphs, compiled callers, 200 steps of training.  On a CPU the same code runs at tiny sizes,
except where there is nothing to try: a CPU's host waits for itself and captures no graph.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import replace
from typing import NamedTuple
from unittest import mock

import torch
from torch import Tensor

from benchmarks.gpu.checks import CASES, Case, check_case, pairs_of
from benchmarks.promises import (
    DTYPES,
    GRAD_FLOOR,
    Outcome,
    assert_close,
    assert_logps,
    outcome,
    relative_error,
)
from realign_kernels import Objective, linear_logprob, rdpo_loss
from realign_kernels.testing import HeadInputs, dense_logprob

REPEATS = 1000
STEPS = 200
OBJECTIVE = Objective.rdpo(0.1, 0.2, 0.5)
# elements that a program handles at a time, and its warps
LAUNCHES = (
    (64, 1), (256, 1), (256, 2), (512, 2), (512, 4), (1024, 2), (1024, 4), (1024, 8), (2048, 4),
    (2048, 8), (4096, 8), (4096, 16), (8192, 16),
)  # fmt: skip


class Large(NamedTuple):
    """Sizes of which one product passes 2^31."""

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


def run_hardware_checks(
    device: torch.device, backend: str, *, tiny: bool = False
) -> Iterator[Outcome]:
    """Try everything; what the promise is stands in each check's own docstring."""
    for large in LARGE:
        sizes = Large(large.name, 96, 301, 40, *large[4:]) if tiny else large
        name = f"beyond 2^31, {large.name}"
        yield outcome(name, _large, device, sizes, backend)
        _release(device)
    for N, V, D, is_frozen in REPEATED[:3] if tiny else REPEATED:
        name = f"repeats, {N} x {V} x {D}, {'frozen' if is_frozen else 'trainable'}"
        count = 3 if tiny else REPEATS
        yield outcome(name, _repeats, device, (N, V, D), is_frozen, count, backend)
    yield from _launches(device, backend, tiny=tiny)
    for dtype in DTYPES:
        for memory in ("frozen", "stash", "tile", "recompute"):
            if device.type == "cuda":
                yield outcome(f"{dtype} no wait, {memory}", _waits, device, dtype, memory, backend)
                yield outcome(f"{dtype} graph, {memory}", _graph, device, dtype, memory, backend)
        yield outcome(f"{dtype} compiled", _compiled, device, dtype, backend)
    for is_frozen in (True, False):
        name = f"{STEPS} steps, {'frozen' if is_frozen else 'trainable'}"
        yield outcome(name, _trajectory, device, is_frozen, STEPS, backend)


def _large(device: torch.device, sizes: Large, backend: str) -> None:
    """Compare the first and the last rows and their gradients with float64."""
    inputs = _draw(device, sizes)
    if sizes.is_frozen:
        inputs.lm_head_weight.requires_grad_(False)
    logps = inputs.call(linear_logprob, backend=backend, stash_bytes=8 << 30)
    upstream = torch.linspace(-1, 2, len(logps), device=device)
    logps.backward(upstream)
    grad = inputs.hidden_states.grad
    assert grad is not None
    for rows in (slice(0, 48), slice(-48, None)):
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
        error = relative_error(grad[rows], hidden.grad)
        assert error <= GRAD_FLOOR["bfloat16"], f"gradient of rows {rows}: {error:.2e}"
    if not sizes.is_frozen:
        error = relative_error(inputs.lm_head_weight.grad, _weight_gradient(inputs, upstream))
        assert error <= GRAD_FLOOR["bfloat16"], f"gradient of lm_head_weight: {error:.2e}"


def _draw(device: torch.device, sizes: Large) -> HeadInputs:
    """Leaves of logits of standard deviation 3, drawn where they are: these are gigabytes."""
    generator = torch.Generator(device).manual_seed(0)

    def normal(*shape: int) -> Tensor:
        return torch.empty(shape, device=device, dtype=torch.bfloat16).normal_(generator=generator)

    N, V, D = sizes.N, sizes.V, sizes.D
    hidden = normal(N, 5, D)[:, 3] if sizes.layout == "strided" else normal(N, D)
    weight = normal(D, V).T if sizes.layout == "transposed" else normal(V, D)
    weight.mul_(3 / math.sqrt(D))
    labels = torch.randint(V, (N,), generator=generator, device=device)
    return HeadInputs(hidden.requires_grad_(), weight.requires_grad_(), labels, {})


def _weight_gradient(inputs: HeadInputs, upstream: Tensor, rows: int = 1024) -> Tensor:
    """Float64's, some rows at a time: all logits at once would not fit."""
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
    """Equal inputs give equal bits, however often."""
    inputs = _draw(device, Large("", *sizes, is_frozen))
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


def _launches(device: torch.device, backend: str, *, tiny: bool) -> Iterator[Outcome]:
    """Every launch configuration keeps the promise; those of a backend without any are one."""
    cases = [case for case in CASES if case.name in ("ragged", "LoRA and bias", "softcap")]
    if backend != "triton" or tiny:
        yield outcome("launch as chosen", _check_cases, device, cases[:1], "float32", backend)
        return
    from realign_kernels.backends.triton import launches

    for block, num_warps in LAUNCHES:
        launch = launches.Launch(block, num_warps)
        for dtype in ("bfloat16", "float32"):
            with mock.patch.object(launches, "launch_of", return_value=launch):
                name = f"{dtype} launch of {block} by {num_warps} warps"
                yield outcome(name, _check_cases, device, cases, dtype, backend)


def _check_cases(device: torch.device, cases: list[Case], dtype: str, backend: str) -> None:
    for case in cases:
        for found in check_case(device, case, dtype, backend):
            assert not found.problem, f"{found.name}: {found.problem}"


def _loss_and_gradients(
    pairs: HeadInputs, ref_logps: Tensor, lengths: Tensor, memory: str, backend: str
) -> list[Tensor]:
    """Return the results of a step; "frozen" ``memory`` is for hidden states' gradients alone."""
    pairs.lm_head_weight.requires_grad_(memory != "frozen")
    output = pairs.call(
        rdpo_loss, ref_logps=ref_logps, objective=OBJECTIVE, sequence_lengths=lengths,
        backend=backend, memory="auto" if memory == "frozen" else memory,
    )  # fmt: skip
    needed = [tensor for tensor in pairs.tensors if tensor.requires_grad]
    return [output.loss.detach(), *torch.autograd.grad(output.loss, needed)]


def _step(device: torch.device, dtype: str) -> tuple[HeadInputs, Tensor, Tensor]:
    pairs = pairs_of(device, dtype).as_leaves()
    lengths = (pairs.labels != -100).sum(-1).view(3, -1).cpu()
    return pairs, torch.full(lengths.shape, -40.0, device=device), lengths


def _waits(device: torch.device, dtype: str, memory: str, backend: str) -> None:
    """With ``sequence_lengths`` nothing of loss and gradients waits for the device."""
    pairs, ref_logps, lengths = _step(device, dtype)
    _loss_and_gradients(pairs, ref_logps, lengths, memory, backend)  # compiles
    torch.cuda.synchronize(device)
    torch.cuda.set_sync_debug_mode("error")
    try:
        _loss_and_gradients(pairs, ref_logps, lengths, memory, backend)
    finally:
        torch.cuda.set_sync_debug_mode("default")


def _graph(device: torch.device, dtype: str, memory: str, backend: str) -> None:
    """Check that a captured step gives, for other hidden states, the bits of an uncaptured one."""
    pairs, ref_logps, lengths = _step(device, dtype)
    side = torch.cuda.Stream(device)
    side.wait_stream(torch.cuda.current_stream(device))
    with torch.cuda.stream(side):
        for _ in range(2):
            _loss_and_gradients(pairs, ref_logps, lengths, memory, backend)
    torch.cuda.current_stream(device).wait_stream(side)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        captured = _loss_and_gradients(pairs, ref_logps, lengths, memory, backend)
    with torch.no_grad():
        pairs.hidden_states.mul_(-0.5)
    graph.replay()
    torch.cuda.synchronize(device)
    expected = _loss_and_gradients(pairs, ref_logps, lengths, memory, backend)
    for number, (one, other) in enumerate(zip(captured, expected, strict=True)):
        assert torch.equal(one, other), f"result {number} differs"


def _compiled(device: torch.device, dtype: str, backend: str) -> None:
    """Check that a caller that is compiled into one graph gets the same numbers."""
    pairs, ref_logps, lengths = _step(device, dtype)

    def call() -> Tensor:
        loss: Tensor = pairs.call(
            rdpo_loss, ref_logps=ref_logps, objective=OBJECTIVE, sequence_lengths=lengths,
            backend=backend, memory="stash",
        ).loss  # fmt: skip
        return loss

    expected = torch.autograd.grad(call(), pairs.tensors)
    compiler = "inductor" if device.type == "cuda" else "aot_eager"
    loss = torch.compile(call, fullgraph=True, backend=compiler)()
    for one, other in zip(torch.autograd.grad(loss, pairs.tensors), expected, strict=True):
        assert_close("gradient", one, other.double(), 1e-6 * float(other.abs().max()))


def _trajectory(device: torch.device, is_frozen: bool, steps: int, backend: str) -> None:
    """Training ends where it ends with the eager backend: loss within 1e-3, 1e-4 on average."""
    fused, eager = (_train(device, is_frozen, steps, name) for name in (backend, "eager"))
    difference = fused - eager
    assert float(difference.abs().max()) <= 1e-3, f"loss off by {float(difference.abs().max())}"
    assert float(difference.mean().abs()) <= 1e-4, f"off by {float(difference.mean())} on average"


def _train(device: torch.device, is_frozen: bool, steps: int, backend: str) -> Tensor:
    """Return the losses of a body of two matrices under LLaVA-1.5's head, or a tiny one."""
    V, D = (301, 40) if device.type == "cpu" else (32064, 4096)
    inputs = _draw(device, Large("", 12 * 40, V, D, is_frozen))
    generator = torch.Generator(device).manual_seed(1)
    down, up = (
        torch.randn(shape, device=device, generator=generator)
        .div_(math.sqrt(shape[0]))
        .requires_grad_()
        for shape in ((D, 64), (64, D))
    )
    head = inputs.lm_head_weight.detach().requires_grad_(not is_frozen)
    hidden, labels = inputs.hidden_states.detach(), inputs.labels.view(12, 40)
    ref_logps = torch.full((3, 4), -500.0, device=device)
    parameters = [down, up, *([] if is_frozen else [head])]
    optimizer = torch.optim.SGD(parameters, lr=1e-3, momentum=0.9)
    losses = []
    for _ in range(steps):
        states = hidden + (hidden.float() @ down).tanh() @ up
        loss = rdpo_loss(
            states.to(hidden.dtype).view(12, 40, D), head, labels, ref_logps, backend=backend
        ).loss
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(loss.detach())
    return torch.stack(losses).double()


def _release(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.empty_cache()
