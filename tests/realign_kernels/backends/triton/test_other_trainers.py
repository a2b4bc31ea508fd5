"""The needs of other trainers of the head, on the Triton backend, against float64."""

from __future__ import annotations

import pytest
import torch

from realign_kernels import (
    Objective,
    Term,
    linear_logprob,
    linear_logprob_stats,
    preference_loss,
    rdpo_loss,
)
from realign_kernels.backends import triton as kernels
from realign_kernels.testing import dense_log_probs, dense_logits, dense_logprob, make_head_inputs
from realign_kernels.tiling import TileShape

pytestmark = pytest.mark.usefixtures("small_blocks", "small_tiles")

F32, F16, BF16 = torch.float32, torch.float16, torch.bfloat16


@pytest.fixture
def small_tiles(monkeypatch):
    """Cut into tiles of 4 rows by 8 columns."""
    monkeypatch.setattr(kernels, "LARGEST_TILE", TileShape(4, 8))


@pytest.mark.parametrize("memory", ["frozen", "stash", "recompute"])
@pytest.mark.parametrize(("dtype", "bound"), [(F32, 5e-6), (F16, 2e-3), (BF16, 2e-2)], ids=str)
def test_gradients_of_entropy_and_lse_equal_float64(memory, dtype, bound):
    inputs = make_head_inputs(6, 18, 5, dtype, bias=True, rank=2, logit_softcap=6.0, ignored=0.2)
    ours, exact = inputs.as_leaves(), inputs.as_leaves(torch.float64)
    for tensor in ours.tensors[1:] if memory == "frozen" else ():
        tensor.requires_grad_(False)
    stats = ours.call(
        linear_logprob_stats, backend="triton", memory="auto" if memory == "frozen" else memory
    )
    is_scored = inputs.labels != -100
    log_probs = dense_log_probs(exact)
    entropy = torch.where(is_scored, -(log_probs.exp() * log_probs).sum(dim=1), 0.0)
    lse = torch.where(is_scored, dense_logits(exact).logsumexp(dim=1), 0.0)
    for actual, expected in ((stats.entropy, entropy), (stats.lse, lse)):
        torch.testing.assert_close(actual.double(), expected, rtol=1e-5, atol=1e-4)
    slope = torch.linspace(-1, 2, 6).double()
    (stats.entropy * slope + stats.lse * 0.3 + stats.token_logps).sum().backward()
    (entropy * slope + lse * 0.3 + dense_logprob(exact)).sum().backward()
    for tensor, oracle in zip(ours.tensors, exact.tensors, strict=True):
        if tensor.requires_grad:
            assert (tensor.grad.double() - oracle.grad).norm() <= bound * oracle.grad.norm()


@pytest.mark.parametrize("frozen", [False, True], ids=["trainable", "frozen"])
@pytest.mark.parametrize("dtypes", [(BF16, F32), (F32, BF16), (F16, F32), (F32, F16)], ids=str)
def test_a_weight_of_another_dtype_is_accurate(dtypes, frozen):
    inputs = make_head_inputs(6, 18, 5, torch.float64, bias=True, rank=2)
    hidden, weight, *others = inputs.tensors
    inputs = inputs.replace_tensors(
        [hidden.to(dtypes[0]), weight.to(dtypes[1]), *(part.to(F32) for part in others)]
    )
    hidden, weight, *others = inputs.tensors
    parts = [hidden, weight.to(dtypes[0]), *others]
    exact = inputs.replace_tensors([part.double() for part in parts]).as_leaves()
    ours = inputs.as_leaves()
    for tensor in ours.tensors[1:] if frozen else ():
        tensor.requires_grad_(False)
    actual = ours.call(linear_logprob, backend="triton")
    expected = dense_logprob(exact)
    assert (actual - expected).abs().max() <= 1e-4
    actual.sum().backward()
    expected.sum().backward()
    bound = {F32: 5e-3 if F16 in dtypes else 2e-2, F16: 2e-3, BF16: 2e-2}
    for tensor, oracle in zip(ours.tensors, exact.tensors, strict=True):
        if tensor.requires_grad:
            assert tensor.grad.dtype == tensor.dtype
            error = (tensor.grad.double() - oracle.grad).norm()
            assert error <= bound[tensor.dtype] * oracle.grad.norm()


@pytest.mark.parametrize("memory", ["stash", "tile"])
@pytest.mark.parametrize(("dtype", "bound"), [(F32, 1e-5), (F16, 2e-3)], ids=str)
def test_token_weights_statistics_and_length_normalized_terms_equal_float64(
    memory, dtype, bound, monkeypatch
):
    monkeypatch.setattr("realign_kernels.ops.pair_tiles._ROWS_PER_TILE", 5)
    objective = Objective((Term((1, -1), beta=2.0, offset=0.5, normalize="length"),))
    inputs = make_head_inputs(12, 13, 4, dtype, ignored=0.3)
    inputs.labels[::3] = 5  # of every answer
    weights = torch.linspace(0.5, 2.0, 12)
    ours, exact = inputs.as_leaves(), inputs.as_leaves(torch.float64)
    output = rdpo_loss(
        ours.hidden_states.reshape(4, 3, 4), ours.lm_head_weight, inputs.labels.reshape(4, 3), None,
        objective=objective, token_weights=weights.reshape(4, 3), statistics=True, memory=memory,
        backend="triton",
    )  # fmt: skip
    is_scored = inputs.labels != -100
    counts = is_scored.reshape(2, 2, 3).sum(dim=2)
    logps = (dense_logprob(exact) * weights).reshape(2, 2, 3).sum(dim=2)
    loss = preference_loss(logps, None, objective, num_tokens=counts).loss
    torch.testing.assert_close(output.loss.double(), loss, rtol=1e-5, atol=1e-5)
    log_probs = dense_log_probs(exact).detach()
    expected = {
        "entropy": -(log_probs.exp() * log_probs).sum(dim=1),
        "mean_logits": dense_logits(exact).detach().mean(dim=1),
        "top1_rate": (log_probs.argmax(dim=1) == inputs.labels).double(),
    }
    for name, tokens in expected.items():
        wanted = torch.where(is_scored, tokens, 0.0).reshape(2, 2, 3).sum(dim=2) / counts
        torch.testing.assert_close(getattr(output, name).double(), wanted, rtol=1e-5, atol=1e-4)
    wanted_grads = torch.autograd.grad(loss, exact.tensors)
    for grad, oracle in zip(
        torch.autograd.grad(output.loss, ours.tensors), wanted_grads, strict=True
    ):
        assert (grad.double() - oracle).norm() <= bound * oracle.norm()
