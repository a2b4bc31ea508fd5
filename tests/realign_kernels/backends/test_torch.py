"""The plain kernels alone: memory, every device's dtypes, and each kernel against a loop."""

from __future__ import annotations

import pytest
import torch

from realign_kernels import linear_logprob, linear_logprob_stats, rdpo_loss
from realign_kernels.backends import cpu
from realign_kernels.backends import torch as kernels
from realign_kernels.testing import dense_logprob, make_head_inputs, peak_bytes, seeded

N, V, D, R = 300, 2048, 8, 2
WORKSPACE_BYTES = 160 << 10
# Positions, labels, sums and results of every row, at most this many numbers of 8 bytes.
ROW_NUMBERS = 40
ROWS = N * ROW_NUMBERS * 8
# Hidden states, gathered and scaled, and sums of as many columns.
ROWS_OF_HIDDEN = 4 * N * (D + R) * 8


def run(function, inputs, **options):
    output = inputs.call(function, backend="eager", workspace_bytes=WORKSPACE_BYTES, **options)
    total = output[0] + output[5] if isinstance(output, tuple) else output
    if total.requires_grad:
        total.backward(torch.ones_like(total))


@pytest.mark.parametrize(
    "dtype",
    [
        torch.bfloat16,
        pytest.param(torch.float32, marks=pytest.mark.full),
        pytest.param(torch.float64, marks=pytest.mark.full),
    ],
    ids=str,
)
@pytest.mark.parametrize("function", [linear_logprob, linear_logprob_stats])
@pytest.mark.parametrize(
    "transform",
    [{}, pytest.param({"logit_softcap": 5.0, "temperature": 0.9}, marks=pytest.mark.full)],
    ids=str,
)
def test_scratch_stays_within_workspace_bytes(function, dtype, transform):
    leaves = make_head_inputs(
        N, V, D, dtype, bias=True, rank=R, ignored=0.1, **transform
    ).as_leaves()
    assert N * V * dtype.itemsize > 5 * WORKSPACE_BYTES
    gradients = sum(tensor.nbytes for tensor in leaves.tensors)
    peak = peak_bytes(lambda: run(function, leaves, memory="recompute"))
    assert peak <= WORKSPACE_BYTES + gradients + ROWS_OF_HIDDEN + ROWS


def test_inference_allocates_only_scratch():
    inputs = make_head_inputs(N, V, D, torch.float32)
    with torch.no_grad():
        assert peak_bytes(lambda: run(linear_logprob, inputs)) <= WORKSPACE_BYTES + ROWS


@pytest.mark.full
def test_a_row_wider_than_the_workspace_is_tiled():
    inputs = make_head_inputs(3, 8_000, 4, torch.float32)
    workspace_bytes = 16 << 10
    assert workspace_bytes < 8_000 * 4

    def score():
        return inputs.call(linear_logprob, backend="eager", workspace_bytes=workspace_bytes)

    assert peak_bytes(score) <= workspace_bytes + 64 * ROW_NUMBERS * 8
    torch.testing.assert_close(score(), dense_logprob(inputs))


@pytest.mark.parametrize("function", [linear_logprob, linear_logprob_stats])
def test_autograd_saves_only_inputs_and_per_row_numbers(function):
    leaves = make_head_inputs(N, V, D, torch.float32, bias=True, rank=R).as_leaves()
    inputs = {tensor.data_ptr() for tensor in leaves.tensors}
    saved = []
    with torch.autograd.graph.saved_tensors_hooks(
        lambda tensor: saved.append(tensor) or tensor, lambda tensor: tensor
    ):
        leaves.call(function, backend="eager", memory="recompute")
    others = [tensor for tensor in saved if tensor.data_ptr() not in inputs]
    assert 0 < len(others) < len(saved)
    assert max(tensor.numel() for tensor in others) <= 4 * N


def test_the_loss_stays_within_workspace_bytes():
    leaves = make_head_inputs(N, V, D, torch.float32, ignored=0.3).as_leaves()
    gradients = sum(tensor.nbytes for tensor in leaves.tensors)

    def step():
        rdpo_loss(
            *leaves.tensors, leaves.labels, torch.zeros(3, 2), sequence_ids=torch.arange(N) % 6,
            backend="eager", memory="recompute", workspace_bytes=WORKSPACE_BYTES,
        ).loss.backward()  # fmt: skip

    assert peak_bytes(step) <= WORKSPACE_BYTES + gradients + ROWS_OF_HIDDEN + ROWS


def test_ignored_rows_take_no_memory():
    """Operations see as many rows as there are labels, not as there are positions."""
    leaves = make_head_inputs(N, V, D, torch.float32).as_leaves()
    leaves.labels[5:] = -100
    peak = peak_bytes(lambda: leaves.call(linear_logprob, backend="eager", memory="recompute"))
    assert peak <= 3 * 64 * V * 4 + ROWS


@pytest.mark.parametrize("count", [0, 1, 40])
def test_entries_are_added_to_their_rows(count, monkeypatch):
    """Entries come in blocks of two, and some lie before and behind the tile."""
    monkeypatch.setattr(kernels, "_MAX_ELEMENTS", 8)
    generator = seeded(count)
    ids, order = torch.randint(12, (count,), generator=generator).sort(stable=True)
    bounds = torch.searchsorted(ids, torch.arange(13))
    coefficient = torch.randn(count, generator=generator, dtype=torch.float64)
    hidden = torch.randn(max(1, count // 2), 4, generator=generator, dtype=torch.float64)
    out = torch.randn(6, 4, generator=generator, dtype=torch.float64)
    expected = out.clone()
    for number, entry in enumerate(order.tolist()):
        row = int(ids[number]) - 3
        if 0 <= row < 6:
            expected[row] += coefficient[entry] * hidden[entry % len(hidden)]
    kernels.add_entries(out, bounds[3:10], order, coefficient, hidden)
    torch.testing.assert_close(out, expected, rtol=1e-13, atol=1e-13)


def test_ids_out_of_range_access_no_memory():
    weight = torch.full((5, 3), torch.inf)
    ids = torch.tensor([-1, 5, 1 << 40])
    out, accumulator = torch.zeros(3), torch.ones(3, 3)
    kernels.label_dot(torch.ones(3, 3), weight, ids, out)
    kernels.combine(accumulator, torch.full((3,), 2.0), weight, ids, torch.ones(3))
    assert out.tolist() == [0.0] * 3
    assert torch.equal(accumulator, torch.full((3, 3), 2.0))
    kernels.combine(accumulator, torch.ones(3), weight[:0], ids, torch.ones(3))
    assert torch.equal(accumulator, torch.full((3, 3), 2.0))


@pytest.mark.parametrize("adds", [False, True])
@pytest.mark.parametrize("shape", [(3, 0, 4), (1, 700, 5), (5, 700, 1), (4, 513, 6), (0, 3, 2)])
def test_products_of_every_shape_equal_a_matmul(shape, adds):
    generator = seeded(0)
    rows, inner, columns = shape
    a = torch.randn(rows, inner, generator=generator, dtype=torch.float64)
    b = torch.randn(columns, inner, generator=generator, dtype=torch.float64).T
    out = torch.full((rows, columns), 1.0 if adds else torch.nan, dtype=torch.float64)
    cpu.product(out, a, b, adds=adds)
    torch.testing.assert_close(out, a @ b + adds)
