"""Checks of callers of the kernels: hosts that must not wait, CUDA graphs, compilation, training.

The first two only run on a GPU.
"""

from __future__ import annotations

import math
from collections.abc import Iterator

import torch
from torch import Tensor

from benchmarks.gpu.checks import check_of, pairs_of
from benchmarks.gpu.session import Check
from benchmarks.promises import DTYPES, assert_close
from realign_kernels import Objective, rdpo_loss
from realign_kernels.testing import HeadInputs

STEPS = 200
OBJECTIVE = Objective.rdpo(0.1, 0.2, 0.5)


def caller_checks(device: torch.device, backend: str) -> Iterator[Check]:
    """Yield the checks, by dtype and by what is kept for the backward."""
    for dtype in DTYPES:
        for memory in ("frozen", "stash", "tile", "recompute"):
            if device.type == "cuda":
                yield check_of(f"{dtype} no wait, {memory}", _waits, device, dtype, memory, backend)
                yield check_of(f"{dtype} graph, {memory}", _graph, device, dtype, memory, backend)
    for is_frozen in (True, False):
        name = f"{STEPS} steps, {'frozen' if is_frozen else 'trainable'}"
        yield check_of(name, _trajectory, device, is_frozen, STEPS, backend)
    for dtype in DTYPES:
        yield check_of(f"{dtype} compiled", _compiled, device, dtype, backend)


def draw(device: torch.device, N: int, V: int, D: int, *, layout: str = "contiguous") -> HeadInputs:
    """Draw leaves whose logits have standard deviation 3, on the device: some are gigabytes."""
    generator = torch.Generator(device).manual_seed(0)

    def normal(*shape: int) -> Tensor:
        return torch.empty(shape, device=device, dtype=torch.bfloat16).normal_(generator=generator)

    hidden = normal(N, 5, D)[:, 3] if layout == "strided" else normal(N, D)
    weight = normal(D, V).T if layout == "transposed" else normal(V, D)
    weight.mul_(3 / math.sqrt(D))
    labels = torch.randint(V, (N,), generator=generator, device=device)
    return HeadInputs(hidden.requires_grad_(), weight.requires_grad_(), labels, {})


def _loss_and_gradients(
    pairs: HeadInputs, ref_logps: Tensor, lengths: Tensor, memory: str, backend: str
) -> list[Tensor]:
    """Return the loss and the gradients of a step; with ``memory="frozen"`` the head has none."""
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
    """Check that with ``sequence_lengths`` neither loss nor gradients wait for the device."""
    pairs, ref_logps, lengths = _step(device, dtype)
    _loss_and_gradients(pairs, ref_logps, lengths, memory, backend)  # compiles
    torch.cuda.synchronize(device)
    torch.cuda.set_sync_debug_mode("error")
    try:
        _loss_and_gradients(pairs, ref_logps, lengths, memory, backend)
    finally:
        torch.cuda.set_sync_debug_mode("default")


def _graph(device: torch.device, dtype: str, memory: str, backend: str) -> None:
    """Check that a captured step has, for other hidden states, the same bits as an eager one."""
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
    """Check that a caller compiled into one graph gets the same numbers."""
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
    """Check that training follows the eager backend: losses within 1e-3, and 1e-4 on average."""
    fused, eager = (_train(device, is_frozen, steps, name) for name in (backend, "eager"))
    difference = fused - eager
    assert float(difference.abs().max()) <= 1e-3, f"loss off by {float(difference.abs().max())}"
    assert float(difference.mean().abs()) <= 1e-4, f"off by {float(difference.mean())} on average"


def _train(device: torch.device, is_frozen: bool, steps: int, backend: str) -> Tensor:
    """Return the losses of a model of two matrices with LLaVA-1.5's head, or with a tiny one."""
    V, D = (301, 40) if device.type == "cpu" else (32064, 4096)
    inputs = draw(device, 12 * 40, V, D)
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
