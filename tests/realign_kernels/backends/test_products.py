"""Products of bfloat16 on CPUs, each by every kind of instructions that this machine has."""

from __future__ import annotations

import itertools
import random

import pytest
import torch

from realign_kernels import linear_logprob, rdpo_loss
from realign_kernels.backends import cpu
from realign_kernels.testing import dense_logits, dense_logprob, make_head_inputs, seeded

pytestmark = pytest.mark.usefixtures("each_product_set")

# Around blocks of 4, 12 and 32 rows, of 32, 64 and 256 columns, and of 2, 32, 256 and 1024 terms.
EDGES = [
    (1, 1, 1), (3, 31, 2), (4, 32, 3), (5, 33, 31), (11, 63, 32), (12, 64, 33), (13, 65, 255),
    (31, 255, 256), (32, 256, 257), (33, 257, 511), (64, 95, 1023), (65, 96, 1024), (49, 97, 1025),
    (1, 300, 2050), (300, 1, 65), (1030, 17, 40), (1200, 33, 512), (1600, 5, 700),
    (0, 5, 3), (5, 0, 3), (5, 3, 0),
]  # fmt: skip
DRAWN = [
    tuple(random.Random(seed).randint(1, most) for most in (130, 300, 1500)) for seed in range(12)
]
SHAPES = [*EDGES, *DRAWN]
EPS = torch.finfo(torch.float32).eps


def normal(*shape, seed=0):
    return torch.randn(*shape, generator=seeded(seed))


def assert_sums(actual, a, b, before=0.0):
    """Compare with float64: 256 terms after a large one are each rounded to its last digit."""
    a, b = a.double(), b.double()
    error = (actual.double() - (a @ b + before)).abs()
    assert (error <= 64 * EPS * (a.abs() @ b.abs() + abs(before)) + 1e-30).all()


def layouts(b):
    """The same matrix in every layout that there are ways to read: strides, and no alignment."""
    rows, columns = b.shape
    spread = torch.full((rows, 2 * columns + 1), 7.0, dtype=b.dtype)
    spread[:, 1::2] = b
    moved = torch.full((rows * columns + 1,), 7.0, dtype=b.dtype)
    moved[1:] = b.flatten()
    return [b, b.T.contiguous().T, spread[:, 1::2], moved[1:].view(rows, columns)]


@pytest.mark.parametrize(("rows", "columns", "terms"), SHAPES)
def test_bfloat16_products_equal_float64_sums(rows, columns, terms):
    a, b = normal(rows, terms).bfloat16(), normal(terms, columns, seed=1).bfloat16()
    expected = None
    for one, other in zip(layouts(a), layouts(b)[::-1], strict=True):
        room = torch.full((rows + 2, columns + 3), 5.0)
        out = room[1:-1, 1 : columns + 1]
        cpu.product(out, one, other, adds=False)
        assert_sums(out, a, b)
        expected = out.clone() if expected is None else expected
        assert torch.equal(out, expected)
        cpu.product(out, one, other, adds=True)
        assert_sums(out, torch.cat([a, a], 1), torch.cat([b, b]))
        out.fill_(5.0)
        assert (room == 5.0).all()


@pytest.mark.parametrize(("rows", "columns", "terms"), SHAPES)
@pytest.mark.parametrize("is_scaled", [False, True], ids=["by_weight", "by_hidden"])
@pytest.mark.parametrize("adds", [False, True])
def test_exponential_products_equal_float64_sums(rows, columns, terms, is_scaled, adds):
    """Exponentials are rounded to bfloat16 except where they are large for their row."""
    shape = (terms, rows) if is_scaled else (rows, terms)
    exponentials, b = (3 * normal(*shape)).exp(), normal(terms, columns, seed=1).bfloat16()
    exponentials[:, ::3] = 0
    totals = exponentials.sum(1) * (0.5 + torch.rand(shape[0]))
    scale = normal(shape[0])
    is_large = exponentials >= totals[:, None] / 64
    factors = exponentials * scale[:, None] if is_scaled else exponentials
    factors = torch.where(is_large, factors, factors.bfloat16().float())
    for given in layouts(exponentials):
        out = torch.full((rows, columns), 0.5)
        cpu.exponential_product(
            out, given, b, totals, scale=scale if is_scaled else None, adds=adds
        )
        assert_sums(out, factors.T if is_scaled else factors, b, 0.5 if adds else 0.0)


def test_entries_do_not_depend_on_other_entries_or_threads():
    a, b = normal(90, 700).bfloat16(), normal(700, 300, seed=1).bfloat16()
    exponentials, totals = normal(90, 700).exp(), torch.full((90,), 100.0)
    before = torch.get_num_threads()

    def products(rows, columns):
        out = [torch.zeros(len(a[rows]), b[:, columns].shape[1]) for _ in range(2)]
        cpu.product(out[0], a[rows], b[:, columns], adds=False)
        cpu.exponential_product(out[1], exponentials[rows], b[:, columns], totals[rows], adds=True)
        return out

    whole = products(slice(None), slice(None))
    try:
        for threads, rows, columns in itertools.product(
            (1, 2, 3, 40), (slice(0, 1), slice(89, 90), slice(7, 60)), (slice(3, 4), slice(40, 300))
        ):
            torch.set_num_threads(threads)
            for part, all_of_it in zip(products(rows, columns), whole, strict=True):
                assert torch.equal(part, all_of_it[rows, columns])
    finally:
        torch.set_num_threads(before)


def test_subnormal_factors_count_as_zero_on_instruction_sets_that_flush_them(each_product_set):
    """The parts that are lost are below 2^-126 times the other factor."""
    tiny, large = torch.full((40, 64), 2.0**-130), torch.full((64, 40), 2.0**100)
    for a, b in ((tiny.bfloat16(), large.bfloat16()), (large.T.bfloat16(), tiny.T.bfloat16())):
        assert (a != 0).all()
        assert (b != 0).all()
        out = torch.empty(40, 40)
        cpu.product(out, a, b, adds=False)
        assert torch.equal(
            out, torch.full_like(out, 64 * 2.0**-30 * (each_product_set == "portable"))
        )


def test_non_finite_values_affect_only_their_row_or_column():
    for value, place in itertools.product((torch.nan, torch.inf), ("a", "b")):
        a, b = normal(40, 70).bfloat16(), torch.ones(70, 80, dtype=torch.bfloat16)
        exponentials, totals = torch.ones(40, 70), torch.ones(40)
        if place == "a":
            a[5, 66] = exponentials[5, 66] = value
        else:
            b[66, 5] = value
        outs = [torch.zeros(40, 80), torch.zeros(40, 80)]
        cpu.product(outs[0], a, b, adds=False)
        cpu.exponential_product(outs[1], exponentials, b, totals, adds=True)
        for out in outs:
            lost = ~out.isfinite()
            assert (lost[5] if place == "a" else lost[:, 5]).all()
            assert lost.sum() == (80 if place == "a" else 40)


def test_products_do_not_disturb_the_tile_state_of_torch():
    """Torch multiplies bfloat16 by the same registers of the same thread."""
    a, b = normal(64, 256).bfloat16(), normal(256, 64).bfloat16()
    out, expected = torch.empty(64, 64), a @ b
    for _ in range(3):
        cpu.product(out, a, b, adds=False)
        assert torch.equal(a @ b, expected)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=str)
@pytest.mark.parametrize(("rows", "terms"), [(1, 1), (63, 255), (64, 256), (65, 257), (200, 1030)])
def test_products_with_a_single_row_or_column_are_accurate(rows, terms, dtype):
    a, b = normal(rows, terms).to(dtype), normal(terms, 1, seed=1).to(dtype)
    tolerance = 100 * torch.finfo(dtype).eps
    results = []
    for one, other, threads in itertools.product(layouts(a), layouts(b), (1, 3)):
        before = torch.get_num_threads()
        torch.set_num_threads(threads)
        column, row = torch.full((rows, 1), 2, dtype=dtype), torch.empty(1, rows, dtype=dtype)
        cpu.product(column, one, other, adds=True)
        cpu.product(row, other.T, one.T, adds=False)
        torch.set_num_threads(before)
        expected = a.double() @ b.double()
        torch.testing.assert_close((column - 2).double(), expected, rtol=tolerance, atol=tolerance)
        torch.testing.assert_close(row.T.double(), expected, rtol=tolerance, atol=tolerance)
        results.append(column)
    assert torch.equal(*results[:2])
    # The part of a few rows is that of all.
    for first in range(0, rows, 7):
        part = torch.full((len(a[first : first + 5]), 1), 2, dtype=dtype)
        cpu.product(part, a[first : first + 5], b, adds=True)
        assert torch.equal(part, results[0][first : first + 5])


HEADS = [(40, 203, 24), (1, 2, 1), (70, 1003, 300), (130, 2049, 33), (65, 64, 257), (9, 4099, 130)]


@pytest.mark.parametrize(("N", "V", "D"), HEADS)
@pytest.mark.parametrize("threads", [1, 2])
@pytest.mark.parametrize("memory", ["frozen", "stash", "recompute"])
def test_heads_of_bfloat16_are_near_float64(N, V, D, threads, memory):
    inputs = make_head_inputs(N, V, D, torch.bfloat16, bias=True, rank=3, ignored=0.2)
    upstream = normal(N)
    leaves, exact, dense = (inputs.as_leaves(d) for d in (None, torch.float64, torch.float32))
    for tensor in leaves.tensors[1:] if memory == "frozen" else ():
        tensor.requires_grad_(False)
    before = torch.get_num_threads()
    torch.set_num_threads(threads)
    try:
        mode = "auto" if memory == "frozen" else memory
        scores = leaves.call(linear_logprob, backend="cpu", memory=mode)
        scores.backward(upstream)
    finally:
        torch.set_num_threads(before)
    expected = dense_logprob(exact)
    expected.backward(upstream.double())
    dense_logprob(dense).backward(upstream)
    labels = inputs.labels.clamp(min=0)[:, None]
    largest = torch.maximum(expected.abs(), dense_logits(exact).gather(1, labels)[:, 0].abs())
    assert ((scores - expected).abs() <= 2e-5 + 1e-6 * largest).all()
    assert_close_gradients(leaves, exact, dense)


def assert_close_gradients(leaves, exact, dense):
    """K05: at most 1.2 times as far from float64 as dense autograd in float32, rounded once."""
    for ours, oracle, plain in zip(leaves.tensors, exact.tensors, dense.tensors, strict=True):
        if not ours.requires_grad:
            continue
        base = torch.linalg.norm(plain.grad.to(ours.dtype).double() - oracle.grad)
        error = torch.linalg.norm(ours.grad.double() - oracle.grad)
        assert error <= 1.2 * base + 1e-7 * torch.linalg.norm(oracle.grad)


@pytest.mark.parametrize("logit_std", [0.1, 3.0, 12.0])
@pytest.mark.parametrize("trains", [False, True], ids=["frozen", "trainable"])
@pytest.mark.parametrize("options", [{}, {"logit_softcap": 8.0}, {"temperature": 0.5}], ids=str)
def test_gradients_are_accurate_under_cancellation(logit_std, trains, options):
    """The rows of a head have a large part in common, of which a rounding error would remain."""
    inputs = make_head_inputs(64, 1003, 96, torch.bfloat16, logit_std=logit_std, **options)
    common = 3 * logit_std / 96**0.5 * normal(1, 96)
    inputs.lm_head_weight.copy_(inputs.lm_head_weight.float() + common)
    leaves, exact, dense = (inputs.as_leaves(d) for d in (None, torch.float64, torch.float32))
    leaves.lm_head_weight.requires_grad_(trains)
    leaves.call(linear_logprob, backend="cpu").sum().backward()
    dense_logprob(exact).sum().backward()
    dense_logprob(dense).sum().backward()
    assert_close_gradients(leaves, exact, dense)


@pytest.mark.parametrize("memory", ["auto", "stash", "recompute", "tile"])
@pytest.mark.parametrize("rejected_scoring", ["label", "top_non_label"])
def test_every_memory_mode_of_the_loss_agrees(memory, rejected_scoring, monkeypatch):
    hidden, weight = normal(60, 40).bfloat16(), (normal(301, 40, seed=1) / 2).bfloat16()
    labels = torch.randint(301, (60,), generator=seeded(2))

    def grads(memory):
        leaves = hidden.clone().requires_grad_(), weight.clone().requires_grad_()
        loss = rdpo_loss(
            *leaves, labels, torch.zeros(3, 2), sequence_ids=torch.arange(60) % 6,
            rejected_scoring=rejected_scoring, memory=memory, backend="cpu",
        ).loss  # fmt: skip
        loss.backward()
        return loss.detach(), *(leaf.grad for leaf in leaves)

    actual = grads(memory)
    with monkeypatch.context() as patch:
        patch.setattr(cpu, "product_set", lambda: "none")
        expected = grads("stash")
    torch.testing.assert_close(actual[0], expected[0], rtol=1e-6, atol=1e-6)
    for one, other in zip(actual[1:], expected[1:], strict=True):
        assert torch.linalg.norm((one - other).double()) <= 4e-3 * torch.linalg.norm(other.double())


@pytest.mark.parametrize("statistics", [False, True])
def test_the_loss_compiles_into_one_graph(statistics):
    """The way in which the head is kept depends on the dtype of products, which C++ reports."""
    leaves = make_head_inputs(12, 31, 16, torch.bfloat16).as_leaves()

    def loss(hidden, weight):
        return rdpo_loss(
            hidden, weight, leaves.labels, torch.zeros(3, 2), sequence_ids=torch.arange(12) % 6,
            statistics=statistics, backend="cpu",
        ).loss  # fmt: skip

    torch._dynamo.reset()
    compiled = torch.compile(loss, fullgraph=True, backend="aot_eager")
    actual, expected = (
        torch.autograd.grad(function(*leaves.tensors), leaves.tensors)
        for function in (compiled, loss)
    )
    for grad, oracle in zip(actual, expected, strict=True):
        assert torch.equal(grad, oracle)


def test_float32_inputs_keep_float32_accuracy():
    """Inputs that are not given in bfloat16 are multiplied in float32, under autocast too."""
    inputs = make_head_inputs(9, 37, 6, torch.bfloat16)
    for tensors in ([inputs.hidden_states.float(), inputs.lm_head_weight],
                    [inputs.hidden_states, inputs.lm_head_weight.float()]):  # fmt: skip
        leaves = inputs.replace_tensors(tensors).as_leaves()
        with torch.autocast("cpu", dtype=torch.bfloat16):
            leaves.call(linear_logprob, backend="cpu").sum().backward()
        exact = inputs.as_leaves(torch.float64)
        dense_logprob(exact).sum().backward()
        for ours, oracle in zip(leaves.tensors, exact.tensors, strict=True):
            if ours.dtype == torch.float32:
                error = torch.linalg.norm(ours.grad.double() - oracle.grad)
                assert error <= 3e-6 * torch.linalg.norm(oracle.grad)
