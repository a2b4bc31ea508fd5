"""Gradients of the entropy and of the log-sum-exp against the dense distribution."""

from __future__ import annotations

import pytest
import torch
from torch.library import opcheck

from realign_kernels import linear_logprob_stats
from realign_kernels.ops import score_tokens as operators
from realign_kernels.testing import (
    dense_log_probs,
    dense_logits,
    dense_logprob,
    make_head_inputs,
    peak_bytes,
)

pytestmark = pytest.mark.usefixtures("each_backend")

MODES = ["auto", "stash", "recompute"]
TRANSFORMS = [{}, {"logit_softcap": 5.0, "logit_scale": 0.7, "temperature": 1.3}]
SLOPES = {
    "entropy": {"entropy": 1.0},
    "lse": {"lse": -0.3},
    "everything": {"entropy": 1.0, "lse": 0.5, "token_logps": -0.7, "top_non_label_logps": 0.2},
}


def dense(inputs):
    """The definitions, differentiable; 0 where a label is ignored."""
    is_scored = inputs.labels != -100
    log_probs = dense_log_probs(inputs)
    index = torch.where(is_scored, inputs.labels, 0)[:, None]
    values = {
        "entropy": -(log_probs.exp() * log_probs).sum(dim=1),
        "lse": dense_logits(inputs).logsumexp(dim=1),
        "token_logps": dense_logprob(inputs),
        "top_non_label_logps": log_probs.scatter(1, index, -torch.inf).amax(dim=1),
    }
    return {name: torch.where(is_scored, value, 0.0) for name, value in values.items()}


def total(values, slopes):
    """One number of several results, with another slope for every row."""
    return sum(
        (factor * torch.linspace(-1, 2, len(values[name])).double() * values[name].double()).sum()
        for name, factor in slopes.items()
    )


@pytest.mark.parametrize("slopes", SLOPES)
@pytest.mark.parametrize("frozen", [False, True], ids=["trainable", "frozen"])
@pytest.mark.parametrize("transform", TRANSFORMS, ids=["plain", "softcapped"])
@pytest.mark.parametrize("memory", MODES)
def test_gradients_of_every_memory_mode_equal_the_dense_formula(memory, transform, frozen, slopes):
    inputs = make_head_inputs(23, 61, 8, bias=True, rank=2, ignored=0.3, **transform)
    ours, exact = inputs.as_leaves(), inputs.as_leaves()
    for tensor in ours.tensors[1:] if frozen else ():
        tensor.requires_grad_(False)
    stats = ours.call(linear_logprob_stats, memory=memory, workspace_bytes=1 << 13)._asdict()
    expected = dense(exact)
    for name in SLOPES["everything"]:
        torch.testing.assert_close(stats[name], expected[name])
    total(stats, SLOPES[slopes]).backward()
    total(expected, SLOPES[slopes]).backward()
    for tensor, oracle in zip(ours.tensors, exact.tensors, strict=True):
        if tensor.requires_grad:
            torch.testing.assert_close(tensor.grad, oracle.grad, rtol=1e-10, atol=1e-11)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16], ids=str)
def test_gradients_are_accurate_in_other_dtypes(dtype):
    inputs = make_head_inputs(23, 203, 16, dtype, bias=True)
    ours, exact = inputs.as_leaves(), inputs.as_leaves(torch.float64)
    ours.call(linear_logprob_stats).entropy.sum().backward()
    dense(exact)["entropy"].sum().backward()
    for tensor, oracle in zip(ours.tensors, exact.tensors, strict=True):
        error = (tensor.grad.double() - oracle.grad).norm() / oracle.grad.norm()
        assert error <= max(3e-6, torch.finfo(dtype).eps)


@pytest.mark.parametrize("miss", [1e-1, 1e-4, 1e-7])
@pytest.mark.parametrize("favourite", ["label", "another"])
def test_entropy_gradients_of_certain_rows_are_accurate(favourite, miss):
    """The derivative is p * (log p + H) with p close to 1: neither is taken from 1 - p."""
    inputs = make_head_inputs(6, 40, 4, torch.float32, logit_std=0.5)
    index = inputs.labels if favourite == "label" else (inputs.labels + 7) % 40
    bias = torch.zeros(40)
    inputs.labels[:] = inputs.labels[0]
    index[:] = index[0]
    bias[index[0]] = torch.log(torch.tensor(40 / miss))
    inputs.options["lm_head_bias"] = bias
    ours, exact = inputs.as_leaves(), inputs.as_leaves(torch.float64)
    ours.call(linear_logprob_stats).entropy.sum().backward()
    dense(exact)["entropy"].sum().backward()
    for tensor, oracle in zip(ours.tensors, exact.tensors, strict=True):
        error = (tensor.grad.double() - oracle.grad).norm()
        assert error <= 2e-5 * oracle.grad.norm()


def test_impossible_tokens_have_zero_gradient():
    inputs = make_head_inputs(5, 37, 4, bias=True)
    inputs.options["lm_head_bias"][[0, 20]] = -torch.inf
    inputs.labels[:] = torch.tensor([0, 1, 2, 20, 36])
    ours = inputs.as_leaves()
    ours.call(linear_logprob_stats).entropy.sum().backward()
    possible = [token for token in range(37) if token not in (0, 20)]
    kept = torch.zeros(37, 35, dtype=torch.float64)
    kept[possible, range(35)] = 1.0
    exact = inputs.as_leaves()
    bias = exact.options["lm_head_bias"]
    logits = (exact.hidden_states @ exact.lm_head_weight.T)[:, possible] + bias[possible]
    torch.special.entr(logits.softmax(dim=1)).sum().backward()
    for tensor, oracle in zip(ours.tensors, exact.tensors, strict=True):
        torch.testing.assert_close(tensor.grad, oracle.grad)


def test_a_one_token_vocabulary_has_zero_entropy_and_gradient():
    hidden = torch.randn(2, 3, requires_grad=True)
    stats = linear_logprob_stats(hidden, torch.randn(1, 3), torch.tensor([0, -100]))
    (stats.entropy.sum()).backward()
    assert (hidden.grad == 0).all()


def test_unused_statistics_add_no_backward_work(monkeypatch):
    """The backward of log-probabilities alone equals that of a call without statistics."""
    called = []
    for name in ("scale_slopes_op", "score_tokens_backward_op"):
        operator = getattr(operators, name)
        monkeypatch.setattr(
            operators, name, lambda *args, name=name, operator=operator: (
                called.append(name) or operator(*args)
            ),
        )  # fmt: skip
    inputs = make_head_inputs(9, 21, 4)
    inputs.hidden_states.requires_grad_()
    for name, expected in (
        ("token_logps", "scale_slopes_op"),
        ("entropy", "score_tokens_backward_op"),
    ):
        stats = inputs.call(linear_logprob_stats)
        called.clear()
        torch.autograd.grad(getattr(stats, name).sum(), inputs.hidden_states)
        assert called == [expected]


def test_a_second_derivative_is_refused():
    inputs = make_head_inputs(5, 11, 4)
    hidden = inputs.hidden_states.requires_grad_()
    entropy = inputs.call(linear_logprob_stats).entropy.sum() + hidden.pow(3).sum()
    (grad,) = torch.autograd.grad(entropy, hidden, create_graph=True)
    with pytest.raises(NotImplementedError, match="differentiated once"):
        torch.autograd.grad(grad.sum(), hidden)


@pytest.mark.parametrize("frozen", [False, True], ids=["trainable", "frozen"])
def test_entropy_gradients_compile_into_one_graph(frozen):
    inputs = make_head_inputs(9, 23, 4, torch.float32, ignored=0.2).as_leaves()
    inputs.lm_head_weight.requires_grad_(not frozen)
    needed = [tensor for tensor in inputs.tensors if tensor.requires_grad]

    def loss(hidden, weight):
        stats = linear_logprob_stats(hidden * 1.0, weight, inputs.labels)
        return stats.token_logps.sum() - stats.entropy.sum() + stats.lse.square().sum()

    torch._dynamo.reset()
    compiled = torch.compile(loss, fullgraph=True, backend="aot_eager")
    actual, expected = (function(*inputs.tensors) for function in (compiled, loss))
    torch.testing.assert_close(actual, expected)
    torch.testing.assert_close(
        torch.autograd.grad(actual, needed), torch.autograd.grad(expected, needed)
    )


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("entropy", [False, True])
def test_opcheck_of_the_backward(entropy, each_backend):
    inputs = make_head_inputs(7, 19, 4, bias=True, rank=2, ignored=0.3)
    hidden, weight, *others = inputs.tensors
    head = operators.HeadArguments(
        hidden, weight, *others, lora_scaling=0.5, transform=[1.0, 4.0, 1.5], autocast_dtype=None,
        backend=each_backend, budget=[1 << 14, 1 << 20], group_name=None,
    )  # fmt: skip
    arguments = operators.ScoreArguments(
        labels=inputs.labels, top_rows=None, sequence_lengths=None, ignore_index=-100,
        keeps="numbers", with_statistics=True, label_shape=[7], witness=None,
    )  # fmt: skip
    scores = operators.FusedScores(*operators.score_tokens_op(*head, *arguments))
    slope = torch.linspace(-1, 1, 7).double()
    kept = operators.BackwardArguments(
        slope, None, slope if entropy else None, slope, scores.entropy if entropy else None,
        inputs.labels, None, scores.positions, scores.numbers, scores.top_ids, scores.stash,
        [True] * 5,
    )  # fmt: skip
    opcheck(operators.score_tokens_backward_op, (*head, *kept))


@pytest.mark.parametrize("rows", [1, 3, 64, 65])
def test_gradients_do_not_depend_on_other_rows(rows):
    """Gradients of a frozen head on a CPU are bitwise equal alone and in any batch."""
    inputs = make_head_inputs(130, 67, 8, torch.float32)

    def gradient(hidden, labels):
        hidden = hidden.detach().clone().requires_grad_()
        stats = linear_logprob_stats(hidden, inputs.lm_head_weight, labels)
        return torch.autograd.grad(stats.entropy.sum(), hidden)[0], stats.entropy.detach()

    whole = gradient(inputs.hidden_states, inputs.labels)
    part = gradient(inputs.hidden_states[:rows], inputs.labels[:rows])
    for ours, all_rows in zip(part, whole, strict=True):
        assert torch.equal(ours, all_rows[:rows])


@pytest.mark.parametrize("softcap", [None, 5.0])
def test_the_backward_stays_within_the_workspace(softcap):
    N, V, D, workspace_bytes = 512, 4096, 64, 4 << 20
    inputs = make_head_inputs(N, V, D, torch.float32, logit_softcap=softcap).as_leaves()
    entropy = inputs.call(linear_logprob_stats, workspace_bytes=workspace_bytes).entropy.sum()
    peak = peak_bytes(entropy.backward)
    gradients = 4 * (V * D + N * D)
    rows = 2 * 4 * N * D
    assert peak <= 1.05 * (workspace_bytes + gradients + rows)
