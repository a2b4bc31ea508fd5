"""Accuracy against float64 on the same rounded inputs, dtype by dtype, at and off tile edges."""

from __future__ import annotations

import pytest
import torch

from realign_kernels import linear_logprob, linear_logprob_stats
from realign_kernels.testing import dense_logits, dense_logprob, make_head_inputs

pytestmark = pytest.mark.usefixtures("each_backend")

BLOCK_N, BLOCK_V = 4, 16


def around(block):
    return (1, block - 1, block, block + 1, 2 * block + 3)


SHAPES = sorted({(n, 33, 7) for n in around(BLOCK_N)} | {(5, v, 7) for v in around(BLOCK_V)})
HALF = [torch.float16, torch.bfloat16]


def bound(oracle, label_logits, dtype):
    """The promised error of a log-probability, per token."""
    absolute = 1e-5 if dtype == torch.float32 else 1e-4
    return absolute + 1e-6 * torch.maximum(oracle.abs(), label_logits.abs())


def label_logits(inputs):
    return dense_logits(inputs).gather(-1, inputs.labels[..., None]).squeeze(-1)


@pytest.mark.parametrize(("N", "V", "D"), SHAPES)
@pytest.mark.parametrize("dtype", [torch.float32, *HALF], ids=str)
@pytest.mark.usefixtures("small_tiles")
def test_rows_that_cross_tile_edges_are_accurate(N, V, D, dtype):
    inputs = make_head_inputs(N, V, D, dtype, bias=True, rank=2)
    oracle = dense_logprob(exact := inputs.as_leaves(torch.float64)).detach()
    actual = inputs.call(linear_logprob)
    assert actual.dtype == torch.float32
    assert ((actual - oracle).abs() <= bound(oracle, label_logits(exact).detach(), dtype)).all()


@pytest.mark.parametrize("logit_std", [1.0, 10.0, 50.0])
@pytest.mark.parametrize("V", [129, 1003, 32003])
@pytest.mark.parametrize("dtype", [torch.float32, *HALF], ids=str)
def test_values_are_within_the_documented_error_bound(V, logit_std, dtype):
    inputs = make_head_inputs(24, V, 64, dtype, logit_std=logit_std)
    exact = inputs.as_leaves(torch.float64)
    oracle = dense_logprob(exact).detach()
    error = (inputs.call(linear_logprob) - oracle).abs()
    assert (error <= bound(oracle, label_logits(exact).detach(), dtype)).all()


def test_bfloat16_logits_are_never_rounded():
    """Rounding logits to bfloat16, as most heads do, is off by a hundredth of a nat a token."""
    inputs = make_head_inputs(64, 1003, 64, torch.bfloat16, logit_std=5.0)
    oracle = dense_logprob(inputs.as_leaves(torch.float64)).detach()
    assert (inputs.call(linear_logprob) - oracle).abs().max() <= 1e-4
    rounded = (dense_logits(inputs).float().log_softmax(-1)).gather(-1, inputs.labels[:, None])
    assert (rounded[:, 0] - oracle).abs().max() > 1e-2


@pytest.mark.parametrize("V", [2, 31, 127, 129, 1000, 4099])
def test_padding_columns_do_not_affect_peaked_rows(V):
    """One token has nearly all of the probability: a padded column of logit 0 would show."""
    inputs = make_head_inputs(16, V, 8, torch.float32)
    inputs.hidden_states[:, 0] = 1.0
    inputs.lm_head_weight[:, 0] = -60.0
    inputs.lm_head_weight[V // 2, 0] = -30.0
    exact = inputs.as_leaves(torch.float64)
    oracle = dense_logprob(exact).detach()
    error = (inputs.call(linear_logprob) - oracle).abs()
    assert (error <= bound(oracle, label_logits(exact).detach(), torch.float32)).all()


def relative_error(actual, oracle):
    return torch.linalg.norm(actual.double() - oracle) / torch.linalg.norm(oracle)


@pytest.mark.parametrize("frozen", [False, True], ids=["trainable", "frozen"])
@pytest.mark.parametrize("dtype", [torch.float32, *HALF], ids=str)
@pytest.mark.usefixtures("small_tiles")
def test_gradients_are_no_worse_than_dense_float32(dtype, frozen):
    """The error is within 1.2 times that of dense float32 autograd plus one rounding."""
    inputs = make_head_inputs(40, 203, 24, dtype, bias=True, rank=3, ignored=0.2)
    upstream = torch.randn(40)
    leaves, exact, dense = (inputs.as_leaves(d) for d in (None, torch.float64, torch.float32))
    for tensor in leaves.tensors[1:] if frozen else ():
        tensor.requires_grad_(False)
    leaves.call(linear_logprob).backward(upstream)
    dense_logprob(exact).backward(upstream.double())
    dense_logprob(dense).backward(upstream)
    limit = 3e-6 if dtype == torch.float32 else torch.finfo(dtype).eps
    for ours, oracle, plain in zip(leaves.tensors, exact.tensors, dense.tensors, strict=True):
        if not ours.requires_grad:
            continue
        assert ours.grad.dtype == dtype
        error = relative_error(ours.grad, oracle.grad)
        assert error <= 1.2 * relative_error(plain.grad.to(dtype), oracle.grad) + 1e-7
        assert error <= limit


@pytest.mark.usefixtures("small_tiles")
def test_float64_stays_float64():
    inputs = make_head_inputs(11, 37, 5)
    stats = inputs.call(linear_logprob_stats)
    assert stats.token_logps.dtype == stats.entropy.dtype == torch.float64
    assert (stats.token_logps - dense_logprob(inputs)).abs().max() < 1e-13


@pytest.mark.parametrize(
    "dtypes", [(torch.float32, torch.float32), (torch.bfloat16, torch.float32)]
)
def test_autocast_rounds_operands_and_nothing_else(dtypes):
    inputs = make_head_inputs(9, 37, 6, torch.float32, bias=True, rank=2)
    leaves = inputs.as_leaves()
    hidden_states = leaves.hidden_states.detach().to(dtypes[0]).requires_grad_()
    with torch.autocast("cpu", dtype=torch.bfloat16):
        token_logps = linear_logprob(
            hidden_states, leaves.lm_head_weight, leaves.labels, **leaves.options
        )
        token_logps.sum().backward()
    rounded = inputs.replace_tensors(
        [
            tensor if tensor.ndim == 1 else tensor.to(torch.bfloat16).float()
            for tensor in inputs.tensors
        ]
    ).as_leaves()
    expected = rounded.call(linear_logprob)
    expected.sum().backward()
    assert torch.equal(token_logps, expected)
    assert hidden_states.grad.dtype == dtypes[0]
    assert torch.equal(leaves.lm_head_weight.grad, rounded.lm_head_weight.grad)


def test_autocast_leaves_float64_alone():
    inputs = make_head_inputs(9, 37, 6)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        assert torch.equal(inputs.call(linear_logprob), inputs.call(linear_logprob))
        actual = inputs.call(linear_logprob)
    torch.testing.assert_close(actual, dense_logprob(inputs))


def test_backward_outside_autocast_equals_backward_inside():
    inputs = make_head_inputs(9, 37, 6, torch.float32)
    grads = []
    for is_inside in (True, False):
        leaves = inputs.as_leaves()
        with torch.autocast("cpu", dtype=torch.bfloat16):
            token_logps = leaves.call(linear_logprob)
        with torch.autocast("cpu", dtype=torch.bfloat16, enabled=is_inside):
            token_logps.sum().backward()
        grads.append([tensor.grad for tensor in leaves.tensors])
    assert all(map(torch.equal, *grads))


def test_float32_adapters_on_a_half_precision_head_keep_float32_gradients():
    """PEFT keeps LoRA factors in float32; rounding them to the head's dtype would lose updates."""
    inputs = make_head_inputs(9, 37, 6, torch.bfloat16)
    factors = make_head_inputs(9, 37, 6, torch.float32, bias=True, rank=2).options
    inputs.options.update(factors)
    leaves = inputs.as_leaves()
    leaves.call(linear_logprob).sum().backward()
    exact = inputs.as_leaves(torch.float64)
    dense_logprob(exact).sum().backward()
    for ours, oracle in zip(leaves.tensors[2:], exact.tensors[2:], strict=True):
        assert ours.grad.dtype == torch.float32
        assert relative_error(ours.grad, oracle.grad) < 3e-6
