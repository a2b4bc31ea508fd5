"""Memory of the eager backend: no tensor of N x V is made or saved, scratch keeps its bound."""

from __future__ import annotations

import pytest
import torch
from torch.multiprocessing.reductions import StorageWeakRef
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from realign_kernels import linear_logprob, linear_logprob_stats, rdpo_loss
from realign_kernels.testing import make_head_inputs

N, V, D, R = 300, 2048, 8, 2
WORKSPACE_BYTES = 160 << 10
# Positions, labels, sums and results of every row, at most this many numbers of 8 bytes.
ROW_NUMBERS = 40


class AllocationRecorder(TorchDispatchMode):
    """Record the largest storage that an operator makes, and the most bytes alive at once."""

    def __init__(self, *inputs):
        super().__init__()
        self.known = {tensor.untyped_storage()._cdata for tensor in inputs}
        self.alive = {}
        self.largest = self.peak = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        result = func(*args, **(kwargs or {}))
        for tensor in tree_leaves(result):
            if isinstance(tensor, torch.Tensor):
                storage = tensor.untyped_storage()
                if storage._cdata not in self.known:
                    self.alive[storage._cdata] = (StorageWeakRef(storage), storage.nbytes())
                    self.largest = max(self.largest, storage.nbytes())
        self.alive = {key: item for key, item in self.alive.items() if not item[0].expired()}
        self.peak = max(self.peak, sum(nbytes for _, nbytes in self.alive.values()))
        return result


def run(function, inputs):
    output = inputs.call(function, backend="eager", workspace_bytes=WORKSPACE_BYTES)
    total = output[0] + output[5] if isinstance(output, tuple) else output
    if total.requires_grad:
        total.backward(torch.ones_like(total))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float64], ids=str)
@pytest.mark.parametrize("function", [linear_logprob, linear_logprob_stats])
@pytest.mark.parametrize("transform", [{}, {"logit_softcap": 5.0, "temperature": 0.9}], ids=str)
def test_scratch_stays_within_workspace_bytes(function, dtype, transform):
    inputs = make_head_inputs(N, V, D, dtype, bias=True, rank=R, ignored=0.1, **transform)
    leaves = inputs.as_leaves()
    assert N * V * dtype.itemsize > 5 * WORKSPACE_BYTES
    with AllocationRecorder(*leaves.tensors) as recorder:
        run(function, leaves)
    assert recorder.largest <= WORKSPACE_BYTES
    gradients = sum(tensor.nbytes for tensor in leaves.tensors)
    accumulators = N * (D + R) * 8 + 2 * R * D * 8
    rows = N * ROW_NUMBERS * 8
    assert recorder.peak <= WORKSPACE_BYTES + gradients + accumulators + rows


def test_without_gradients_there_is_nothing_but_scratch():
    inputs = make_head_inputs(N, V, D, torch.float32)
    with AllocationRecorder(*inputs.tensors) as recorder, torch.no_grad():
        run(linear_logprob, inputs)
    assert recorder.peak <= WORKSPACE_BYTES + N * ROW_NUMBERS * 8


def test_a_row_wider_than_the_workspace_is_cut_too():
    inputs = make_head_inputs(3, 50_000, 4, torch.float32)
    workspace_bytes = 16 << 10
    assert workspace_bytes < 50_000 * 4
    with AllocationRecorder(*inputs.tensors) as recorder:
        actual = inputs.call(linear_logprob, backend="eager", workspace_bytes=workspace_bytes)
    assert recorder.largest <= workspace_bytes
    torch.testing.assert_close(actual, inputs.call(linear_logprob))


@pytest.mark.parametrize("function", [linear_logprob, linear_logprob_stats])
def test_autograd_saves_inputs_and_numbers_a_row(function):
    leaves = make_head_inputs(N, V, D, torch.float32, bias=True, rank=R).as_leaves()
    inputs = {tensor.data_ptr() for tensor in leaves.tensors}
    saved = []
    with torch.autograd.graph.saved_tensors_hooks(
        lambda tensor: saved.append(tensor) or tensor, lambda tensor: tensor
    ):
        leaves.call(function, backend="eager")
    others = [tensor for tensor in saved if tensor.data_ptr() not in inputs]
    assert len(others) < len(saved)
    assert max(tensor.numel() for tensor in others) <= N


def test_the_loss_keeps_the_promise_too():
    leaves = make_head_inputs(N, V, D, torch.float32, ignored=0.3).as_leaves()
    sequence_ids = torch.arange(N) % 6
    with AllocationRecorder(*leaves.tensors) as recorder:
        rdpo_loss(
            *leaves.tensors,
            leaves.labels,
            torch.zeros(3, 2),
            sequence_ids=sequence_ids,
            backend="eager",
            workspace_bytes=WORKSPACE_BYTES,
        ).loss.backward()
    assert recorder.largest <= WORKSPACE_BYTES


def test_ignored_rows_cost_nothing():
    """Operations see as many rows as there are labels, not as there are positions."""
    leaves = make_head_inputs(N, V, D, torch.float32).as_leaves()
    leaves.labels[5:] = -100
    with AllocationRecorder(*leaves.tensors) as recorder:
        leaves.call(linear_logprob, backend="eager")
    assert recorder.peak <= 3 * 5 * V * 4 + N * ROW_NUMBERS * 8
