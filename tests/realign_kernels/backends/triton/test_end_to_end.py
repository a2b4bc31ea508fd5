"""The public functions on the Triton backend, against dense float64."""

from __future__ import annotations

import pytest
import torch

from realign_kernels import linear_logprob, linear_logprob_stats, preference_loss, rdpo_loss
from realign_kernels import objective as objectives
from realign_kernels.backends import triton as kernels
from realign_kernels.testing import (
    dense_log_probs,
    dense_logits,
    dense_logprob,
    make_head_inputs,
    seeded,
)
from realign_kernels.tiling import TileShape

pytestmark = pytest.mark.usefixtures("small_blocks", "small_tiles")

# Bounds of values and, beside the largest entry, of gradients: the operand's rounding, which the
# interpreter cuts off in bfloat16.
TOLERANCES = {
    torch.float64: (1e-12, 1e-12),
    torch.float32: (1e-5, 1e-5),
    torch.float16: (1e-4, 2e-3),
    torch.bfloat16: (1e-4, 2e-2),
}
HEADS = {
    "plain": {},
    "bias": {"bias": True},
    "lora": {"rank": 3},
    "everything": {
        "bias": True, "rank": 2, "logit_softcap": 6.0, "logit_scale": 0.8, "temperature": 1.2,
        "ignored": 0.4,
    },
}  # fmt: skip


@pytest.fixture
def small_tiles(monkeypatch):
    """Cut into tiles of 4 rows by 8 columns."""
    monkeypatch.setattr(kernels, "LARGEST_TILE", TileShape(4, 8))


def compare(inputs, *, memory, bound=None, trainable=True):
    dtype = inputs.hidden_states.dtype
    value_bound, gradient_bound = TOLERANCES[dtype]
    exact, leaves = inputs.as_leaves(torch.float64), inputs.as_leaves()
    if not trainable:
        for tensor in leaves.tensors[1:]:
            tensor.requires_grad_(False)
    expected = dense_logprob(exact)
    actual = leaves.call(linear_logprob, backend="triton", memory=memory)
    assert actual.dtype == (torch.float64 if dtype == torch.float64 else torch.float32)
    size = expected.abs().detach() if bound is None else bound
    assert ((actual - expected).abs() <= value_bound + 2e-6 * size).all()
    upstream = torch.linspace(-1.0, 2.0, len(actual)).to(actual.dtype)
    wanted = torch.autograd.grad(expected, exact.tensors, upstream.double())
    needed = [tensor for tensor in leaves.tensors if tensor.requires_grad]
    given = torch.autograd.grad(actual, needed, upstream)
    for one, other in zip(given, wanted, strict=False):
        assert one.dtype == dtype
        assert ((one - other).abs() <= gradient_bound * other.abs().max() + 1e-12).all()
    is_ignored = inputs.labels == -100
    assert (actual[is_ignored] == 0).all()
    assert (given[0][is_ignored] == 0).all()


@pytest.mark.parametrize("head", HEADS)
@pytest.mark.parametrize("memory", ["stash", "recompute"])
@pytest.mark.parametrize(
    "dtype", [torch.float16, pytest.param(torch.float32, marks=pytest.mark.full)], ids=str
)
def test_trainable_head_equals_dense_float64(head, memory, dtype):
    compare(make_head_inputs(6, 18, 5, dtype, **HEADS[head]), memory=memory)


@pytest.mark.parametrize("memory", ["auto", "recompute"])
@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16], ids=str)
def test_trainable_head_in_other_dtypes_equals_dense_float64(memory, dtype):
    compare(make_head_inputs(6, 18, 5, dtype, **HEADS["everything"]), memory=memory)


@pytest.mark.parametrize("trainable", [False, True])
@pytest.mark.parametrize("memory", ["stash", "recompute"])
def test_no_tile_is_widened_for_low_rank_factors_in_bfloat16(monkeypatch, trainable, memory):
    """Tensor cores multiply two parts of each factor; a float32 one would copy every tile."""
    product, seen = kernels.product, []

    def noted(out, a, b, *, adds):
        seen.append((tuple(a.shape), a.dtype, tuple(b.shape), b.dtype))
        product(out, a, b, adds=adds)

    monkeypatch.setattr(kernels, "product", noted)
    inputs = make_head_inputs(6, 18, 5, torch.bfloat16, rank=3)
    compare(inputs, memory=memory, trainable=trainable)
    tiles = {(rows, columns) for rows in (4, 2) for columns in (8, 2)}
    tiles |= {(columns, rows) for rows, columns in tiles}
    wide = [one for one in seen if one[0] in tiles and one[1] == torch.float32]
    assert not wide
    assert any(a == torch.bfloat16 and shape[1] == 6 for _, a, shape, _ in seen)  # two parts of B


@pytest.mark.parametrize("head", ["plain", "everything"])
@pytest.mark.parametrize("dtype", TOLERANCES, ids=str)
def test_frozen_head_equals_dense_float64(head, dtype):
    inputs = make_head_inputs(6, 18, 5, dtype, **HEADS[head])
    compare(inputs, memory="auto", trainable=False)


@pytest.mark.parametrize(("N", "V", "D"), [(1, 21, 6), (4, 8, 4), (3, 7, 3), (5, 9, 5), (11, 1, 1)])
@pytest.mark.parametrize(
    ("dtype", "memory"), [(torch.float32, "recompute"), (torch.float16, "stash")], ids=str
)
def test_shapes_at_block_edges_equal_dense_float64(N, V, D, memory, dtype):
    compare(make_head_inputs(N, V, D, dtype, bias=True), memory=memory)


@pytest.mark.parametrize("trainable", [False, True])
@pytest.mark.parametrize("memory", ["stash", "recompute"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16], ids=str)
def test_widely_spread_logits_equal_dense_float64(trainable, memory, dtype):
    """Shifts move in some rows, and labels are nearly certain or nearly impossible in others."""
    inputs = make_head_inputs(6, 18, 5, dtype, logit_std=40.0)
    certain = dense_logits(inputs.as_leaves(torch.float64)).argmax(dim=1)
    inputs.labels[:3] = certain[:3]
    bound = dense_logits(inputs.as_leaves(torch.float64)).detach().abs().amax(dim=1)
    compare(inputs, memory=memory, trainable=trainable, bound=bound)


@pytest.mark.parametrize("num_rows", [0, 3])
def test_a_batch_without_labels_gives_zero_scores_and_gradients(num_rows):
    inputs = make_head_inputs(num_rows, 9, 5, torch.float32, ignored=1.1).as_leaves()
    actual = inputs.call(linear_logprob, backend="triton")
    assert actual.tolist() == [0.0] * num_rows
    for grad in torch.autograd.grad(actual.sum(), inputs.tensors):
        assert (grad == 0).all()


@pytest.mark.parametrize("head", ["plain", "everything"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16], ids=str)
@pytest.mark.parametrize("trainable", [True, pytest.param(False, marks=pytest.mark.full)])
def test_statistics_and_their_gradients_equal_dense_float64(head, dtype, trainable):
    inputs = make_head_inputs(6, 21, 6, dtype, **HEADS[head])
    exact, leaves = inputs.as_leaves(torch.float64), inputs.as_leaves()
    if not trainable:
        for tensor in leaves.tensors[1:]:
            tensor.requires_grad_(False)
    log_probs = dense_log_probs(exact)
    is_scored = inputs.labels != -100
    labels = torch.where(is_scored, inputs.labels, 0)[:, None]
    others, ids = log_probs.scatter(1, labels, -torch.inf).max(dim=1)
    stats = leaves.call(linear_logprob_stats, backend="triton")
    expected = {
        "token_logps": log_probs.gather(1, labels)[:, 0],
        "entropy": -(log_probs.exp() * log_probs).sum(dim=1),
        "log_sum_sq_probs": torch.logsumexp(2 * log_probs, dim=1),
        "mean_logits": dense_logits(exact).mean(dim=1),
        "top_non_label_logps": others,
    }
    for name, values in expected.items():
        wanted = torch.where(is_scored, values, 0.0).detach()
        torch.testing.assert_close(getattr(stats, name).double(), wanted, rtol=1e-5, atol=1e-4)
    assert torch.equal(stats.top_non_label_ids, torch.where(is_scored, ids, -1))
    is_top1 = is_scored & (expected["token_logps"] > others)
    assert torch.equal(stats.is_top1, is_top1)
    total = stats.token_logps.sum() + (stats.top_non_label_logps * 0.7).sum()
    dense = torch.where(is_scored, expected["token_logps"] + 0.7 * others, 0.0).sum()
    needed = [tensor for tensor in leaves.tensors if tensor.requires_grad]
    for one, other in zip(
        torch.autograd.grad(total, needed), torch.autograd.grad(dense, exact.tensors), strict=False
    ):
        assert ((one - other).abs() <= TOLERANCES[dtype][1] * other.abs().max()).all()


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16], ids=str)
def test_top_non_label_logps_of_certain_labels_are_finite(dtype):
    """exp(x[y] - shift) overflows where the first tile has set the shift far below the label."""
    generator = seeded(0)
    hidden = torch.ones(2, 1, dtype=dtype, requires_grad=True)
    weight = torch.randn(12, 1, generator=generator).to(dtype)
    weight[10] = 130.0
    weight.requires_grad_()
    labels = torch.tensor([10, 10])
    stats = linear_logprob_stats(hidden, weight, labels, backend="triton")
    exact = [tensor.detach().double().requires_grad_() for tensor in (hidden, weight)]
    log_probs = (exact[0] @ exact[1].T).log_softmax(dim=1)
    top, _ = log_probs[:, torch.arange(12) != 10].max(dim=1)
    torch.testing.assert_close(stats.top_non_label_logps.double(), top, rtol=1e-5, atol=0.0)
    assert (stats.token_logps.abs() < 1e-30).all()
    total = (stats.top_non_label_logps + stats.token_logps).sum()
    wanted = torch.autograd.grad((top + log_probs[:, 10]).sum(), exact)
    for one, other in zip(torch.autograd.grad(total, (hidden, weight)), wanted, strict=True):
        torch.testing.assert_close(one.double(), other, rtol=2e-3, atol=1e-6)


@pytest.mark.parametrize("scoring", ["label", "top_non_label"])
@pytest.mark.parametrize(
    ("dtype", "memory"), [(torch.float32, "recompute"), (torch.float16, "stash")], ids=str
)
def test_rdpo_loss_and_gradients_equal_dense_float64(scoring, dtype, memory):
    inputs = make_head_inputs(18, 13, 4, dtype, ignored=0.3, logit_std=1.0)
    num_pairs, num_positions = 2, 3
    shape = 3 * num_pairs, num_positions
    inputs.labels[: 2 * num_positions] = 5
    exact, leaves = inputs.as_leaves(torch.float64), inputs.as_leaves()
    ref_logps = -torch.arange(6.0).reshape(3, num_pairs)
    output = rdpo_loss(
        leaves.hidden_states.reshape(*shape, 4), leaves.lm_head_weight,
        inputs.labels.reshape(shape), ref_logps, backend="triton", memory=memory,
        rejected_scoring=scoring,
    )  # fmt: skip
    log_probs = dense_log_probs(exact)
    is_scored = inputs.labels != -100
    labels = torch.where(is_scored, inputs.labels, 0)[:, None]
    tokens = log_probs.gather(1, labels)[:, 0]
    if scoring == "top_non_label":
        others = log_probs.scatter(1, labels, -torch.inf).amax(dim=1)
        tokens = torch.where(torch.arange(18) < num_pairs * num_positions, tokens, others)
    logps = torch.where(is_scored, tokens, 0.0).reshape(shape).sum(dim=1).reshape(3, num_pairs)
    counts = is_scored.reshape(shape).sum(dim=1).reshape(3, num_pairs)
    loss = preference_loss(
        logps, ref_logps.double(), objectives.Objective.rdpo(), num_tokens=counts
    ).loss
    torch.testing.assert_close(output.loss.double(), loss.detach(), rtol=1e-5, atol=0.0)
    for one, other in zip(
        torch.autograd.grad(output.loss, leaves.tensors),
        torch.autograd.grad(loss, exact.tensors),
        strict=True,
    ):
        assert ((one - other).abs() <= TOLERANCES[dtype][1] * other.abs().max()).all()


def test_no_operator_forces_a_gpu_synchronization(monkeypatch):
    """Tensors made of the host's numbers, and sizes that depend on values: a CUDA graph could not
    be captured.
    """
    inputs = make_head_inputs(12, 9, 4, torch.float32, bias=True, rank=2, ignored=0.5)
    inputs.labels[::2] = 5  # of every sequence
    shape, ref_logps = (6, 2), -torch.arange(6.0).reshape(3, 2)
    lengths = (inputs.labels != -100).reshape(shape).sum(dim=1).reshape(3, 2).cpu()

    def score(beta):
        leaves = inputs.as_leaves()
        leaves.call(linear_logprob, backend="triton").sum().backward()
        inputs.call(linear_logprob_stats, backend="triton")
        for memory in ("stash", "tile", "recompute"):
            leaves = inputs.as_leaves()
            hidden, weight, *_ = leaves.tensors
            rdpo_loss(
                hidden.reshape(*shape, 4), weight, inputs.labels.reshape(shape), ref_logps,
                sequence_lengths=lengths, backend="triton", memory=memory, beta=beta,
                **leaves.options,
            ).loss.backward()  # fmt: skip

    score(0.1)
    called = []

    def recorded(name):
        function = getattr(torch, name)

        def call(*args, **kwargs):
            called.append(name)
            return function(*args, **kwargs)

        return call

    for name in ("tensor", "bincount", "unique", "masked_select", "repeat_interleave"):
        monkeypatch.setattr(torch, name, recorded(name))
    score(0.2)  # nor are the numbers of an objective that is new
    assert called == []


@pytest.mark.parametrize("memory", ["stash", "recompute"])
def test_uninitialised_memory_is_not_read(memory, poison_empty):
    compare(make_head_inputs(6, 17, 5, torch.float16, **HEADS["everything"]), memory=memory)


def test_repeated_calls_are_bitwise_equal():
    inputs = make_head_inputs(7, 21, 6, torch.float16, bias=True)
    runs = []
    for _ in range(2):
        leaves = inputs.as_leaves()
        value = leaves.call(linear_logprob, backend="triton")
        runs.append([value, *torch.autograd.grad(value.sum(), leaves.tensors)])
    assert all(torch.equal(one, other) for one, other in zip(*runs, strict=True))


def test_a_large_scale_does_not_overflow_float16():
    """The product e * phi is kept, and the guard leaves room for phi."""
    weight = torch.zeros(40, 2, dtype=torch.float16)
    weight[1:, 0] = torch.linspace(-0.2, 0.1875, 39)
    hidden = torch.ones(1, 2, dtype=torch.float16, requires_grad=True)
    logps = linear_logprob(hidden, weight, torch.tensor([0]), logit_scale=40.0, backend="triton")
    exact = hidden.detach().double().requires_grad_()
    oracle = torch.log_softmax(exact @ weight.double().T * 40.0, 1)[:, 0]
    (grad,) = torch.autograd.grad(logps, hidden)
    (expected,) = torch.autograd.grad(oracle, exact)
    assert (grad.double() - expected).abs().max() <= 2e-3 * expected.abs().max()
