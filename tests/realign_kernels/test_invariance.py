"""The bits of a row's result depend on that row alone, for any batch, threads and run."""

from __future__ import annotations

import os
import subprocess
import sys

import pytest
import torch

from realign_kernels import linear_logprob, linear_logprob_stats, rdpo_loss
from realign_kernels.testing import make_head_inputs, seeded

DTYPES = [torch.float32, torch.bfloat16, torch.float64]
# Two row blocks and a few rows; three column tiles, the last ragged.  MKL splits the sums of
# products narrower than 128 over four threads or more: those depend on the number of threads.
N, V, D = 1030, 4099, 128


@pytest.fixture(scope="module", params=DTYPES, ids=str)
def inputs(request):
    return make_head_inputs(N, V, D, request.param, bias=True, rank=128)


@pytest.fixture
def threads():
    before = torch.get_num_threads()
    yield torch.set_num_threads
    torch.set_num_threads(before)


def slopes_and_scores(inputs, rows):
    """Return scores, and the gradient of each row by a frozen head."""
    hidden_states = inputs.hidden_states[rows].clone().requires_grad_()
    scores = linear_logprob(
        hidden_states, inputs.lm_head_weight, inputs.labels[rows], backend="cpu", **inputs.options
    )
    scores.sum().backward()
    return scores.detach(), hidden_states.grad


def test_batch_size_and_position_do_not_matter(inputs):
    """K25: the rows are alone, few, at another place of the batch or in another block."""
    scores, grads = slopes_and_scores(inputs, slice(None))
    for rows in ([0], [N - 1], [5, 700], list(range(63)), list(range(500, 1030)),
                 list(range(N - 1, -1, -1))):  # fmt: skip
        own_scores, own_grads = slopes_and_scores(inputs, rows)
        assert torch.equal(own_scores, scores[rows])
        assert torch.equal(own_grads, grads[rows])


def test_number_of_threads_does_not_matter(inputs, threads):
    """K25."""
    results = []
    for number in (1, 2, 3, 8):
        threads(number)
        leaves = inputs.as_leaves()
        scores = leaves.call(linear_logprob, backend="cpu")
        scores.sum().backward()
        stats = inputs.call(linear_logprob_stats, backend="cpu")
        results.append([scores.detach(), *stats, *(tensor.grad for tensor in leaves.tensors)])
    for other in results[1:]:
        assert all(map(torch.equal, results[0], other))


@pytest.mark.parametrize("memory", ["auto", "stash", "recompute"])
def test_repeated_calls_are_bitwise_equal(memory):
    """K24."""
    inputs = make_head_inputs(70, 513, 33, torch.float32, bias=True, rank=2, ignored=0.2)
    first = None
    for _ in range(100):
        leaves = inputs.as_leaves()
        scores = leaves.call(linear_logprob, backend="cpu", memory=memory)
        scores.sum().backward()
        result = [scores.detach(), *(tensor.grad for tensor in leaves.tensors)]
        first = first or result
        assert all(map(torch.equal, first, result))


def test_order_of_a_packed_batch_does_not_matter():
    """Sums per sequence are taken in double and rounded once."""
    generator = seeded(0)
    hidden_states = torch.randn(900, 16, generator=generator)
    weight, labels = torch.randn(40, 16), torch.randint(40, (900,), generator=generator)
    ids, ref_logps = torch.arange(900) % 6, torch.randn(3, 2)
    expected = rdpo_loss(hidden_states, weight, labels, ref_logps, sequence_ids=ids)
    for _ in range(5):
        order = torch.randperm(900, generator=generator)
        actual = rdpo_loss(
            hidden_states[order], weight, labels[order], ref_logps, sequence_ids=ids[order]
        )
        assert all(map(torch.equal, actual, expected))


SCRIPT = """
import sys, torch
from realign_kernels import linear_logprob_stats
from realign_kernels.backends import cpu
from realign_kernels.testing import dense_logprob, make_head_inputs
assert cpu.instruction_set() == sys.argv[1], cpu.instruction_set()
for dtype in (torch.float32, torch.float64):
    inputs = make_head_inputs(37, 1003, 70, dtype, bias=True, logit_softcap=20.0)
    actual = inputs.call(linear_logprob_stats, backend="cpu").token_logps
    expected = dense_logprob(inputs.as_leaves(torch.float64))
    assert (actual - expected).abs().max() < (1e-5 if dtype == torch.float32 else 1e-12)
"""


@pytest.mark.parametrize("name", ["baseline", "avx2", "avx512"])
def test_every_instruction_set_is_invariant(name):
    flags = {"baseline": "fpu", "avx2": "avx2", "avx512": "avx512dq"}
    with open("/proc/cpuinfo", encoding="utf-8") as cpuinfo:
        has_it = flags[name] in cpuinfo.read().split()
    if not has_it:
        pytest.skip(f"this machine has no {name}")
    subprocess.run(
        [sys.executable, "-c", SCRIPT, name],
        env={**os.environ, "REALIGN_CPU_ISA": name},
        check=True,
        timeout=120,
    )
