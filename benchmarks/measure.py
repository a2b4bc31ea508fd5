"""Time, memory, operations and error of one provider at one shape.

- **Time**: the provider and one plain GEMM ``hidden @ W.T`` (into a given output, in the dtype of
  the inputs) take turns in the order A B B A, so that both run at the same clock rates; CUDA events
  on GPUs, ``perf_counter`` elsewhere.  Caches are warm, and gradients are newly allocated.
- **Memory**: the peak of what a call allocates, including outputs and gradients but not inputs.
  On GPUs it is ``torch.cuda.max_memory_allocated``.  On CPUs it is the running sum of the
  allocator's events in ``torch.profiler``: a ``TorchDispatchMode`` does not see inside custom
  operators, and ``tracemalloc`` does not see tensors.  Buffers of the BLAS are not included.
- **Error**: against float64 from the same rounded inputs.
- **Operations** are those of the algorithm (``providers.Flops``), and are not counted.

Letters: **N** tokens, **D** hidden size, **V** vocabulary.
"""

from __future__ import annotations

import itertools
import statistics
import time
from collections.abc import Callable
from typing import Any, NamedTuple

import torch
from torch import Tensor

from benchmarks.head.providers import BETA, Inputs, Provider
from benchmarks.shapes import HeadShape
from realign_kernels import testing

SECONDS, REPEATS = 0.25, 7  # a cell is measured until one of them is reached
_LEAST_BLOCKS = 2  # of A B B A


class Exact(NamedTuple):
    """Results in float64."""

    result: Tensor  # (N,) or ()
    grad_hidden: Tensor  # (N, D)
    grad_weight: Tensor  # (V, D)


def exact(inputs: Inputs, job: str, *, rows: int = 512) -> Exact:
    """Compute a job in float64, a few rows at a time, with gradients from their formula."""
    hidden = inputs.hidden_states.detach().flatten(0, -2).double()
    weight = inputs.lm_head_weight.detach().double()
    labels = inputs.labels.flatten()
    blocks = [slice(start, start + rows) for start in range(0, len(hidden), rows)]
    token_logps = torch.cat(
        [
            _logits(hidden[block], weight, inputs.logit_softcap)
            .log_softmax(-1)
            .gather(-1, labels[block, None])
            .squeeze(-1)
            for block in blocks
        ]
    )
    result, slopes = _reduce(token_logps, inputs, job)
    grad_hidden, grad_weight = torch.empty_like(hidden), torch.zeros_like(weight)
    for block in blocks:
        logits = _logits(hidden[block], weight, inputs.logit_softcap)
        grad = logits.softmax(-1).neg_()
        grad[torch.arange(len(grad), device=grad.device), labels[block]] += 1
        if inputs.logit_softcap is not None:
            grad.mul_(1 - (logits / inputs.logit_softcap).square_())
        grad.mul_(slopes[block, None])
        torch.mm(grad, weight, out=grad_hidden[block])
        grad_weight.addmm_(grad.T, hidden[block])
    return Exact(result, grad_hidden, grad_weight)


def errors(result: Tensor, inputs: Inputs, truth: Exact) -> dict[str, float]:
    """Return the errors of a result and of the gradients in ``inputs``.

    ``logp_*`` are absolute errors over rows, ``grad_*`` relative errors in the Frobenius norm.
    """
    difference = (result.double() - truth.result).abs().flatten()
    found = {
        "logp_p50": quantile(difference, 0.5),
        "logp_p99": quantile(difference, 0.99),
        "logp_max": difference.max().item(),
    }
    for name, tensor, grad in (
        ("grad_hidden", inputs.hidden_states, truth.grad_hidden),
        ("grad_weight", inputs.lm_head_weight, truth.grad_weight),
    ):
        if tensor.grad is not None:
            error = tensor.grad.view(grad.shape).double() - grad
            found[name] = (error.norm() / grad.norm()).item()
    return found


def quantile(values: Tensor, q: float) -> float:
    """Return a quantile of any number of values; NaN if one of them is NaN."""
    if values.isnan().any():
        return float("nan")
    return values.flatten().sort().values[round(q * (values.numel() - 1))].item()


def peak_bytes(call: Callable[[], object], device: torch.device) -> int:
    """Return the peak of what a call allocates, beyond what was allocated before it."""
    if device.type == "cuda":
        torch.cuda.synchronize(device)
        torch.cuda.reset_peak_memory_stats(device)
        before = torch.cuda.memory_allocated(device)
        kept = call()
        torch.cuda.synchronize(device)
        del kept
        return torch.cuda.max_memory_allocated(device) - before
    return testing.peak_bytes(call)


def interleave(
    ours: Callable[[], object],
    gemm: Callable[[], object],
    device: torch.device,
    *,
    seconds: float = SECONDS,
    repeats: int = REPEATS,
) -> tuple[list[float], list[float]]:
    """Time two calls in the order A B B A, after two rounds that are not counted.

    Returns the milliseconds of both, ``ours`` first.
    """
    times: tuple[list[float], list[float]] = ([], [])
    calls = (gemm, ours)
    for _ in range(2):  # the first calls wait for memory pages from the system
        gemm()
        ours()
    started = time.perf_counter()
    blocks = 0
    while blocks < _LEAST_BLOCKS or (
        len(times[0]) < repeats and time.perf_counter() - started < seconds
    ):
        order = (0, 1, 1, 0)
        for which, ms in zip(order, _time_each([calls[i] for i in order], device), strict=True):
            times[which].append(ms)
        blocks += 1
    return times[1], times[0]


def time_one(
    call: Callable[[], object],
    device: torch.device,
    *,
    prepare: Callable[[], object] = lambda: None,
    seconds: float = SECONDS,
    repeats: int = REPEATS,
) -> list[float]:
    """Time a call alone, after two calls that are not counted; return milliseconds.

    ``prepare`` runs before each call and is not timed.
    """
    for _ in range(2):
        prepare()
        call()
    started, times = time.perf_counter(), []
    while len(times) < 3 or (len(times) < repeats and time.perf_counter() - started < seconds):
        prepare()
        times += _time_each([call], device)
    return times


def summary(times: list[float]) -> dict[str, float]:
    """Return median, p10 and p90 of milliseconds, and their number."""
    ordered = sorted(times)
    last = len(ordered) - 1
    return {
        "ms": statistics.median(ordered),
        "ms_p10": ordered[round(0.1 * last)],
        "ms_p90": ordered[round(0.9 * last)],
        "repeats": len(ordered),
    }


def measure_cell(
    provider: Provider,
    mode: str,
    shape: HeadShape,
    inputs: Inputs,
    truth: Exact,
    *,
    seconds: float = SECONDS,
    repeats: int = REPEATS,
) -> dict[str, Any]:
    """Measure a provider in a mode; errors and memory come first, so that caches are warm."""
    device = inputs.hidden_states.device
    found = errors(provider.run(mode, inputs), inputs, truth)
    _drop_gradients(inputs)
    peak = peak_bytes(lambda: provider.run(mode, inputs), device)
    hidden, weight = inputs.hidden_states.detach().flatten(0, -2), inputs.lm_head_weight.detach()
    out = hidden.new_empty(shape.N, shape.V)
    times, gemm_times = interleave(
        lambda: provider.run(mode, inputs),
        lambda: torch.mm(hidden, weight.T, out=out),
        device,
        seconds=seconds,
        repeats=repeats,
    )
    _drop_gradients(inputs)
    timing, gemm = summary(times), summary(gemm_times)["ms"]
    flops = provider.flops_in(mode, device.type)
    return {
        **timing,
        "gemm_ms": gemm,
        "ratio_to_gemm": timing["ms"] / gemm,
        "peak_bytes": peak,
        "flops_nvd": flops,
        "tflops_per_s": flops * shape.N * shape.V * shape.D / timing["ms"] / 1e9,
        "errors": found,
    }


def _drop_gradients(inputs: Inputs) -> None:
    inputs.hidden_states.grad = inputs.lm_head_weight.grad = None


def _logits(hidden: Tensor, weight: Tensor, softcap: float | None) -> Tensor:
    logits = hidden @ weight.T
    return logits if softcap is None else logits.div_(softcap).tanh_().mul_(softcap)


def _reduce(token_logps: Tensor, inputs: Inputs, job: str) -> tuple[Tensor, Tensor]:
    """Return a job's result, and its derivative with respect to each token's log-probability."""
    leaf = token_logps.requires_grad_()
    result = leaf
    if job == "mean":
        result = leaf.mean()
    elif job == "dpo":
        chosen, rejected = leaf.view(inputs.labels.shape).sum(-1).chunk(2)
        result = -torch.nn.functional.logsigmoid(BETA * (chosen - rejected)).mean()
    (slopes,) = torch.autograd.grad(result, leaf, inputs.grad_token_logps.double())
    return result.detach(), slopes


def _time_each(calls: list[Callable[[], object]], device: torch.device) -> list[float]:
    if device.type != "cuda":
        times = []
        for call in calls:
            started = time.perf_counter()
            call()
            times.append(1e3 * (time.perf_counter() - started))
        return times
    marks = [torch.cuda.Event(enable_timing=True) for _ in range(len(calls) + 1)]
    torch.cuda.synchronize(device)
    marks[0].record()
    for call, mark in zip(calls, marks[1:], strict=True):
        call()
        mark.record()
    torch.cuda.synchronize(device)
    return [before.elapsed_time(after) for before, after in itertools.pairwise(marks)]
