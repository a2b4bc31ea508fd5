"""Hidden states and head of different dtypes: the weight is rounded as the hidden states are."""

from __future__ import annotations

import pytest
import torch

from realign_kernels import Objective, linear_logprob, linear_logprob_stats, rdpo_loss
from realign_kernels.testing import (
    HeadInputs,
    dense_logprob,
    dense_rdpo_loss,
    make_head_inputs,
    peak_bytes,
)

pytestmark = pytest.mark.usefixtures("each_backend")

F32, F16, BF16 = torch.float32, torch.float16, torch.bfloat16
PAIRS = [(BF16, F32), (F32, BF16), (F16, F32), (F32, F16), (BF16, F16), (F16, BF16)]


def mixed(hidden_dtype, weight_dtype, **options):
    """Inputs whose weight is not yet a number of the hidden states' dtype."""
    inputs = make_head_inputs(23, 61, 16, torch.float64, bias=True, rank=2, ignored=0.2, **options)
    hidden, weight, *others = inputs.tensors
    return inputs.replace_tensors(
        [hidden.to(hidden_dtype), weight.to(weight_dtype), *(part.to(F32) for part in others)]
    )


def rounded(inputs):
    """The same call in float64, with the weight as it is rounded."""
    hidden, weight, *others = inputs.tensors
    parts = [hidden, weight.to(hidden.dtype), *others]
    return inputs.replace_tensors([part.double() for part in parts]).as_leaves()


@pytest.mark.parametrize("frozen", [False, True], ids=["trainable", "frozen"])
@pytest.mark.parametrize("memory", ["auto", "recompute"])
@pytest.mark.parametrize("dtypes", PAIRS, ids=str)
@pytest.mark.usefixtures("small_tiles")
def test_values_and_gradients_of_mixed_dtypes_are_accurate(dtypes, memory, frozen):
    inputs = mixed(*dtypes)
    ours, exact = inputs.as_leaves(), rounded(inputs)
    for tensor in ours.tensors[1:] if frozen else ():
        tensor.requires_grad_(False)
    actual, expected = ours.call(linear_logprob, memory=memory), dense_logprob(exact)
    assert actual.dtype == F32
    assert ((actual - expected).abs() <= 1e-5 + 1e-6 * expected.abs()).all()
    upstream = torch.linspace(-1, 2, 23)
    actual.backward(upstream)
    expected.backward(upstream.double())
    for tensor, oracle in zip(ours.tensors, exact.tensors, strict=True):
        if tensor.requires_grad:
            assert tensor.grad.dtype == tensor.dtype
            error = (tensor.grad.double() - oracle.grad).norm() / oracle.grad.norm()
            assert error <= max(3e-6, torch.finfo(tensor.dtype).eps)


@pytest.mark.parametrize("autocast", [F16, BF16])
@pytest.mark.parametrize("dtypes", [(BF16, BF16), (F16, F16), (F16, BF16), (F32, BF16)], ids=str)
def test_a_trained_head_takes_a_half_dtype_that_is_not_that_of_autocast(dtypes, autocast):
    inputs = make_head_inputs(23, 61, 16, torch.float64)
    hidden, weight = (part.to(kind) for part, kind in zip(inputs.tensors, dtypes, strict=True))
    ours = inputs.replace_tensors([hidden, weight]).as_leaves()
    exact = inputs.replace_tensors([part.to(autocast).double() for part in (hidden, weight)])
    exact = exact.as_leaves()
    with torch.autocast("cpu", dtype=autocast):
        token_logps = ours.call(linear_logprob)
    expected = dense_logprob(exact)
    assert ((token_logps - expected).abs() <= 1e-5 + 1e-6 * expected.abs()).all()
    token_logps.sum().backward()
    expected.sum().backward()
    for tensor, oracle in zip(ours.tensors, exact.tensors, strict=True):
        error = (tensor.grad.double() - oracle.grad).norm() / oracle.grad.norm()
        assert error <= max(3e-6, torch.finfo(tensor.dtype).eps)


@pytest.mark.parametrize("memory", ["stash", "tile"])
def test_the_loss_and_its_statistics_accept_mixed_dtypes(memory):
    inputs = mixed(BF16, F32)
    hidden, weight, *_ = inputs.tensors
    hidden, labels = hidden[:18].reshape(6, 3, 16), inputs.labels[:18].reshape(6, 3).clone()
    labels[:, 0] = 4
    leaves = [part.clone().requires_grad_() for part in (hidden, weight)]
    loss = rdpo_loss(*leaves, labels, torch.zeros(3, 2), memory=memory).loss
    exact = [part.double().requires_grad_() for part in (hidden, weight.to(BF16))]
    oracle = dense_rdpo_loss(
        HeadInputs(*exact, labels, {}), torch.zeros(3, 2), Objective.rdpo()
    ).loss
    torch.testing.assert_close(loss.double(), oracle, rtol=1e-5, atol=0)
    grads = torch.autograd.grad(loss, leaves)
    for grad, expected in zip(grads, torch.autograd.grad(oracle, exact), strict=True):
        assert (grad.double() - expected).norm() <= 4e-3 * expected.norm()
    stats = mixed(F32, BF16).call(linear_logprob_stats)
    assert stats.entropy.dtype == F32


def test_autocast_still_rounds_everything():
    inputs = mixed(BF16, F32)
    with torch.autocast("cpu", dtype=F16):
        actual = inputs.call(linear_logprob)
    parts = [part if number == 2 else part.to(F16) for number, part in enumerate(inputs.tensors)]
    exact = inputs.replace_tensors([part.double() for part in parts])
    torch.testing.assert_close(actual.double(), dense_logprob(exact), rtol=1e-6, atol=1e-5)


@pytest.mark.parametrize("dtypes", [(F32, torch.float64), (torch.float64, BF16)], ids=str)
def test_float64_with_another_dtype_is_refused(dtypes):
    with pytest.raises(TypeError, match="Cast one of them: float64 mixes with nothing"):
        mixed(*dtypes).call(linear_logprob)


def test_a_mixed_dtype_head_is_not_copied(each_backend):
    """A copy of it would be 16 MiB; the tiles are 1 MiB."""
    inputs = make_head_inputs(8, 1 << 15, 128, BF16)
    weight = inputs.lm_head_weight.float()
    with torch.no_grad():
        peak = peak_bytes(
            lambda: linear_logprob(
                inputs.hidden_states, weight, inputs.labels, workspace_bytes=1 << 20
            )
        )
    assert peak < 4 << 20


def test_mixed_dtypes_compile_into_one_graph():
    inputs = mixed(BF16, F32).as_leaves()
    torch._dynamo.reset()
    compiled = torch.compile(
        lambda hidden, weight: linear_logprob(hidden, weight, inputs.labels).sum(),
        fullgraph=True,
        backend="aot_eager",
    )
    needed = inputs.tensors[:2]
    grads = torch.autograd.grad(compiled(*needed), needed)
    expected = linear_logprob(*needed, inputs.labels).sum()
    for grad, oracle in zip(grads, torch.autograd.grad(expected, needed), strict=True):
        assert torch.equal(grad, oracle)
