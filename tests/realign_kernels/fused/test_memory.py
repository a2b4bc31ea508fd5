"""K34: the peak memory of the CPU backend is that of docs/guides/head.md, within 5 %."""

from __future__ import annotations

import pytest
import torch

from realign_kernels import linear_logprob, rdpo_loss
from realign_kernels.backends import cpu
from realign_kernels.head import Precision
from realign_kernels.testing import make_head_inputs, peak_bytes
from realign_kernels.tiling import TileShape, tile_shape

N, V, D = 1024, 8192, 256
WORKSPACE_BYTES = 256 << 20
DTYPES = [torch.float32, torch.bfloat16, torch.float64]


def is_cast(dtype):
    """Return whether a dtype is cast, since the machine has no products of bfloat16."""
    return dtype == torch.bfloat16 and cpu.product_set() == "none"


def tile_bytes(dtype, workspace_bytes=WORKSPACE_BYTES):
    """One tile of logits and, where it is cast, of the head."""
    number = 8 if dtype == torch.float64 else 4
    rows, columns = tile_shape(
        cpu.LARGEST_TILE, D, 0, (number, number, number), workspace_bytes,
        temporaries=cpu.TEMPORARIES, casts_head=is_cast(dtype), sums_head_gradient=False,
    )  # fmt: skip
    cast = columns * D * number if is_cast(dtype) else 0
    return rows * columns * number + cast


@pytest.mark.parametrize("hidden_size", [2048, 4096, 8192])
def test_a_gpu_uses_full_tiles_where_the_head_is_not_copied(hidden_size):
    """Only logits and exponentials are scratch for a frozen head in half precision."""
    arguments = (TileShape(4096, 8192), hidden_size, 0, (4, 2, 2), WORKSPACE_BYTES)
    frozen = tile_shape(*arguments, temporaries=0, casts_head=False, sums_head_gradient=False)
    assert frozen == (4096, 8192)
    for casts, sums in ((True, False), (False, True), (True, True)):
        rows, columns = tile_shape(
            *arguments, temporaries=0, casts_head=casts, sums_head_gradient=sums
        )
        head = columns * (2 * hidden_size * casts + 4 * (hidden_size + 1) * sums)
        assert WORKSPACE_BYTES / 4 < rows * columns * 6 + head <= WORKSPACE_BYTES


@pytest.mark.parametrize("weight", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("autocast", [None, torch.bfloat16], ids=str)
@pytest.mark.parametrize("operand", [torch.float32, torch.bfloat16], ids=str)
def test_copies_of_product_operands_are_predicted(weight, autocast, operand):
    precision, tensor = (
        Precision(autocast, torch.float32, operand, operand),
        torch.zeros(2, dtype=weight),
    )
    is_copy = precision.of_operand(tensor).data_ptr() != tensor.data_ptr()
    assert precision.copies(weight) == is_copy


def row_bytes(dtype, num_copies):
    number = 8 if dtype == torch.float64 else 4
    return N * D * number * num_copies


def assert_within(actual, expected):
    assert expected * 0.95 <= actual <= expected * 1.05, (actual / expected, actual, expected)


def gathered(dtype):
    """Hidden states are copied where they are cast; here every one of them has a label."""
    return row_bytes(dtype, int(is_cast(dtype)))


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_forward_memory_equals_the_documented_peak(dtype):
    inputs = make_head_inputs(N, V, D, dtype)

    def run():
        with torch.no_grad():
            return inputs.call(linear_logprob, backend="cpu")

    assert_within(peak_bytes(run), tile_bytes(dtype) + gathered(dtype))


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_frozen_head_memory_equals_the_documented_peak(dtype):
    inputs = make_head_inputs(N, V, D, dtype)
    inputs.hidden_states.requires_grad_()

    def run():
        scores = inputs.call(linear_logprob, backend="cpu")
        scores.sum().backward()
        return scores

    assert_within(peak_bytes(run), tile_bytes(dtype) + gathered(dtype) + row_bytes(dtype, 1))


@pytest.mark.parametrize("memory", ["stash", "recompute"])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_trainable_head_memory_equals_the_documented_peak(dtype, memory):
    leaves = make_head_inputs(N, V, D, dtype).as_leaves()

    def run():
        scores = leaves.call(linear_logprob, backend="cpu", memory=memory)
        scores.sum().backward()
        return scores

    number = 8 if dtype == torch.float64 else 4
    gradients = V * D * dtype.itemsize
    tile = tile_bytes(dtype)
    if memory == "stash":
        rows, columns = tile_shape(
            cpu.LARGEST_TILE, D, 0, (number, number, number), WORKSPACE_BYTES, temporaries=0,
            casts_head=False, sums_head_gradient=False,
        )  # fmt: skip
        tile += N * V * number - rows * columns * number
    # Of the gradient by the weight, one tile is summed before it is rounded.
    tile += 0 if dtype.itemsize == number else 2048 * D * number
    # Where bfloat16 is multiplied as it is, no hidden state is widened for the entries of labels.
    num_wide = 1 if dtype == torch.bfloat16 and not is_cast(dtype) else 2
    expected = tile + gradients + gathered(dtype) + row_bytes(dtype, num_wide)
    assert_within(peak_bytes(run), expected)


def test_the_tiles_of_the_loss_bound_the_stash(monkeypatch):
    """The stash holds the rows of one group of pairs, for any size of the batch."""
    monkeypatch.setattr("realign_kernels.ops.pair_tiles._ROWS_PER_TILE", 128)
    leaves = make_head_inputs(N, V, D, torch.float32).as_leaves()
    hidden_states = leaves.hidden_states.view(32, 32, D)[:30]
    labels = leaves.labels.view(32, 32)[:30]

    def run():
        output = rdpo_loss(
            hidden_states, leaves.lm_head_weight, labels, torch.zeros(3, 10), memory="tile",
            backend="cpu",
        )  # fmt: skip
        output.loss.backward()
        return output

    weight = V * D * 4
    # The gradient is kept by the operator until the backward scales it into a second one.
    assert peak_bytes(run) <= 128 * V * 4 + 2 * weight + 8 * N * D * 4


@pytest.mark.parametrize("workspace_bytes", [1 << 20, 4 << 20])
def test_a_smaller_workspace_is_kept(workspace_bytes):
    inputs = make_head_inputs(N, V, D, torch.float32)

    def run():
        with torch.no_grad():
            return inputs.call(linear_logprob, backend="cpu", workspace_bytes=workspace_bytes)

    assert peak_bytes(run) <= workspace_bytes + 40 * 8 * N


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("with_gradient", [False, True])
def test_a_smaller_workspace_is_kept_with_low_rank_factors(dtype, with_gradient):
    rank, hidden_size, workspace_bytes = 256, 512, 4 << 20
    inputs = make_head_inputs(512, 16384, hidden_size, dtype, rank=rank)
    inputs.hidden_states.requires_grad_(with_gradient)

    def run():
        with torch.set_grad_enabled(with_gradient):
            return inputs.call(linear_logprob, backend="cpu", workspace_bytes=workspace_bytes)

    # gathered hidden states and their low-rank product, A; the same again with the derivative
    rows = 512 * (hidden_size + rank) * 4 + rank * hidden_size * 4
    assert peak_bytes(run) <= workspace_bytes + (1 + 2 * with_gradient) * rows + 40 * 8 * 512


@pytest.mark.parametrize("with_gradient", [False, True])
def test_ignored_rows_take_no_memory(with_gradient):
    """Only the results and gradients of ignored rows take memory, and they are zeros."""
    inputs = make_head_inputs(N, V, D, torch.float32)
    inputs.labels[5:] = -100
    inputs.hidden_states.requires_grad_(with_gradient)

    def run():
        scores = inputs.call(linear_logprob, backend="cpu")
        if with_gradient:
            scores.sum().backward()
        return scores

    gradient = N * D * 4 if with_gradient else 0
    assert peak_bytes(run) <= 64 * 2048 * 4 + 3 * 64 * D * 4 + gradient + 40 * 8 * N


def test_a_slice_of_a_batch_is_not_copied():
    """Next-token prediction passes such a slice: all positions except the last."""
    hidden_states = torch.randn(4, 257, D)
    labels = torch.full((4, 256), -100)
    labels[:, :5] = 3
    weight = torch.randn(V, D)

    def run():
        with torch.no_grad():
            return linear_logprob(hidden_states[:, :-1], weight, labels, backend="cpu")

    assert peak_bytes(run) <= 64 * 2048 * 4 + 64 * D * 4 + 40 * 8 * N


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_frozen_head_memory_of_large_rows_equals_the_documented_peak(dtype):
    """Rows and not tiles take the memory: the derivative, its product and the gradient."""
    inputs = make_head_inputs(2048, 600, 512, dtype)
    inputs.hidden_states.requires_grad_()
    number = 8 if dtype == torch.float64 else 4
    rows = 2048 * 512

    def run():
        scores = inputs.call(linear_logprob, backend="cpu")
        scores.sum().backward()
        return scores

    gradient = rows * dtype.itemsize
    block = 1024 * 512 * (number + (dtype.itemsize if dtype.itemsize != number else 0))
    forward, backward = rows * number, rows * number + gradient + block
    if is_cast(dtype):
        forward += rows * number + 600 * 512 * number  # gathered, and the cast head
    tile = 512 * 600 * number
    assert_within(peak_bytes(run), max(forward + tile, backward))
