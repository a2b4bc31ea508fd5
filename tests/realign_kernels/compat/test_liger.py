"""Liger's DPO loss and scaled cross-entropy against float64 on the same rounded inputs."""

from __future__ import annotations

import functools
import inspect

import pytest
import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.tensor import Shard, distribute_tensor

from realign_kernels import rdpo_loss
from realign_kernels.compat.liger import (
    LigerFusedLinearDPOLoss,
    LigerFusedLinearScaledCrossEntropyFunction,
    liger_fused_linear_dpo,
)
from realign_kernels.testing import seeded

# dtype to what log-probabilities and gradients may be off by, the latter relative
BOUNDS = {torch.float32: (1e-5, 1e-6), torch.bfloat16: (1e-4, 2.5e-3)}
P, T, V, D = 3, 7, 61, 16
LOSS_TYPES = ["sigmoid", "hinge", "bco_pair", "nca_pair"]
REFUSED_TYPES = ["exo_pair", "robust", "sppo_hard", "apo_zero", "apo_down", "discopop"]


def make_tensors(dtype=torch.float64, *, bias=True, ignore_index=-100):
    """Hidden states, weight and bias of the policy and of the reference, and labels."""
    generator = seeded(1)

    def normal(*shape, std=1.0):
        values = torch.randn(*shape, generator=generator, dtype=torch.float64) * std
        return values.to(dtype)

    def head():
        return [
            normal(2 * P, T, D),
            normal(V, D, std=D**-0.5),
            normal(V) if bias else None,
        ]

    policy, reference = head(), head()
    labels = torch.randint(0, V, (2 * P, T), generator=generator)
    labels[labels == ignore_index] = 0
    for row in range(2 * P):
        labels[row, : row % 4] = ignore_index
    return policy, reference, labels


def as_leaves(tensors, dtype=None):
    return [
        None
        if tensor is None
        else tensor.detach().to(dtype or tensor.dtype, copy=True).requires_grad_()
        for tensor in tensors
    ]


def dense_logits(hidden, weight, bias):
    logits = hidden @ weight.T
    return logits if bias is None else logits + bias


def dense_logps(tensors, labels, ignore_index, average):
    """Sums or means of each answer's log-probabilities, (2, P)."""
    is_scored = labels != ignore_index
    index = torch.where(is_scored, labels, 0)[..., None]
    token_logps = dense_logits(*tensors).log_softmax(dim=-1).gather(-1, index).squeeze(-1)
    sums = (token_logps * is_scored).sum(dim=1)
    return (sums / is_scored.sum(dim=1) if average else sums).view(2, P)


def dense_losses(loss_type, log_ratios, beta):
    """The losses of the papers, one line each."""
    chosen, rejected = beta * log_ratios
    return {
        "sigmoid": -F.logsigmoid(chosen - rejected),
        "hinge": torch.relu(1 - (chosen - rejected)),
        "bco_pair": -F.logsigmoid(chosen) - F.logsigmoid(-rejected),
        "nca_pair": -F.logsigmoid(chosen)
        - 0.5 * F.logsigmoid(-chosen)
        - 0.5 * F.logsigmoid(-rejected),
    }[loss_type]


def dense(policy, reference, labels, *, loss_type, beta, average=False, alpha=None, ignore=-100):
    """Return the results of Liger by their definitions, without the NLL where ``alpha`` is None."""
    logps = dense_logps(policy, labels, ignore, average)
    ref_logps = 0.0 if reference is None else dense_logps(reference, labels, ignore, average)
    loss = dense_losses(loss_type, logps - ref_logps, beta).mean()
    logits = dense_logits(*policy)
    nll = logits.new_zeros(())
    if alpha is not None:
        nll = F.cross_entropy(logits[:P].flatten(0, 1), labels[:P].flatten(), ignore_index=ignore)
        loss = loss + alpha * nll
    rewards = beta * (logps - ref_logps)
    return loss, (*logps, logits[:P].mean(), logits[P:].mean(), nll, *rewards)


def check(actual, expected, leaves, exact, dtype):
    bound, bound_of_gradients = BOUNDS[dtype]
    loss, extras = actual
    oracle, oracle_extras = expected
    assert len(extras) == len(oracle_extras) == 7
    for value, right in zip((loss, *extras), (oracle, *oracle_extras), strict=True):
        assert (value.dtype, value.shape) == (torch.float32, right.shape)
        assert ((value - right).abs() <= bound * right.abs().clamp(min=1)).all()
    assert loss.requires_grad
    assert not any(value.requires_grad for value in extras)
    loss.backward()
    oracle.backward()
    for tensor, right in zip(leaves, exact, strict=True):
        if tensor is not None:
            assert tensor.grad.dtype == dtype
            assert (tensor.grad - right.grad).norm() <= bound_of_gradients * right.grad.norm()


@pytest.mark.parametrize("dtype", BOUNDS, ids=str)
@pytest.mark.parametrize("average", [False, True], ids=["sum", "average"])
@pytest.mark.parametrize("alpha", [None, 0.7], ids=["no nll", "nll"])
@pytest.mark.parametrize("loss_type", LOSS_TYPES)
@pytest.mark.usefixtures("each_backend")
def test_losses_equal_their_formulas(loss_type, alpha, average, dtype):
    policy, reference, labels = make_tensors(dtype)
    leaves, exact = as_leaves(policy), as_leaves(policy, torch.float64)
    # sums are far apart: on the slope of the hinge, and where a sigmoid still bends
    beta = 2.0 if average else 0.05
    module = LigerFusedLinearDPOLoss(
        beta=beta,
        loss_type=loss_type,
        average_log_prob=average,
        compute_nll_loss=alpha is not None,
        alpha=alpha or 1.0,
    )
    ref_hidden, ref_weight, ref_bias = reference
    actual = module(leaves[1], leaves[0], labels, leaves[2], ref_hidden, ref_weight, ref_bias)
    expected = dense(
        exact, [part.double() for part in reference], labels,
        loss_type=loss_type, beta=beta, average=average, alpha=alpha,
    )  # fmt: skip
    check(actual, expected, leaves, exact, dtype)


@pytest.mark.parametrize("bias", [False, True])
@pytest.mark.parametrize("ignore_index", [-100, 42])
def test_bias_and_ignore_index_equal_the_dense_formula(ignore_index, bias):
    policy, reference, labels = make_tensors(torch.float32, bias=bias, ignore_index=ignore_index)
    leaves, exact = as_leaves(policy), as_leaves(policy, torch.float64)
    module = LigerFusedLinearDPOLoss(ignore_index, 0.2, compute_nll_loss=True)
    actual = module(leaves[1], leaves[0], labels, leaves[2], *reference)
    expected = dense(
        exact, [None if part is None else part.double() for part in reference], labels,
        loss_type="sigmoid", beta=0.2, alpha=1.0, ignore=ignore_index,
    )  # fmt: skip
    check(actual, expected, leaves, exact, torch.float32)


@pytest.mark.parametrize("average", [False, True], ids=["sum", "average"])
def test_known_reference_logps_replace_the_reference_head(average):
    """The reference is given by log-probabilities instead of a head, or is absent."""
    policy, reference, labels = make_tensors()
    options = {"beta": 0.3, "average_log_prob": average}
    _, (chosen, rejected, *_) = liger_fused_linear_dpo(
        reference[0], reference[1], labels, reference[2], use_ref_model=False, **options
    )
    hidden, weight, bias = policy
    by_model = liger_fused_linear_dpo(hidden, weight, labels, bias, *reference, **options)
    by_cache = liger_fused_linear_dpo(
        hidden, weight, labels, bias, ref_logps=torch.stack([chosen, rejected]), **options
    )
    torch.testing.assert_close(by_cache, by_model)
    free = liger_fused_linear_dpo(hidden, weight, labels, bias, use_ref_model=False, **options)
    expected = dense(policy, None, labels, loss_type="sigmoid", beta=0.3, average=average)
    torch.testing.assert_close(free, expected)
    # As in Liger, a reference that is not to be used is not read.
    ignored = LigerFusedLinearDPOLoss(use_ref_model=False, **options)
    torch.testing.assert_close(ignored(weight, hidden, labels, bias, *reference), free)


def test_the_reference_has_no_gradient():
    policy, reference, labels = make_tensors()
    reference = as_leaves(reference)
    hidden, weight, bias = as_leaves(policy)
    loss, _ = liger_fused_linear_dpo(hidden, weight, labels, bias, *reference)
    loss.backward()
    assert all(part.grad is None for part in reference)


@pytest.mark.parametrize("memory", ["tile", "stash"])
def test_the_nll_has_its_gradient_in_every_mode(memory, monkeypatch):
    """A large batch takes its gradients tile by tile, where only the terms of pairs are known."""
    in_this_mode = functools.partial(rdpo_loss, memory=memory)
    monkeypatch.setattr("realign_kernels.compat.liger.rdpo_loss", in_this_mode)
    policy, reference, labels = make_tensors()
    leaves, exact = as_leaves(policy), as_leaves(policy)
    hidden, weight, bias = leaves
    loss, _ = liger_fused_linear_dpo(
        hidden, weight, labels, bias, *reference, compute_nll_loss=True, alpha=3.0
    )
    oracle, _ = dense(exact, reference, labels, loss_type="sigmoid", beta=0.1, alpha=3.0)
    torch.testing.assert_close(
        torch.autograd.grad(loss, leaves), torch.autograd.grad(oracle, exact)
    )


def test_the_function_accepts_its_arguments_in_the_order_of_liger():
    order = (
        "_input weight target bias ref_input ref_weight ref_bias ignore_index beta "
        "compute_nll_loss compiled use_ref_model average_log_prob chunk_size loss_type "
        "label_smoothing discopop_tau alpha ref_logps"
    )
    parameters = inspect.signature(liger_fused_linear_dpo).parameters
    assert [*parameters] == order.split()
    assert parameters["ref_logps"].kind is inspect.Parameter.KEYWORD_ONLY
    (hidden, weight, bias), reference, labels = make_tensors()
    actual = liger_fused_linear_dpo(
        hidden, weight, labels, bias, *reference,
        -100, 0.3, True, False, True, True, 2, "hinge", 0.0, 0.05, 0.5,
    )  # fmt: skip
    expected = dense(
        (hidden, weight, bias), reference, labels,
        loss_type="hinge", beta=0.3, average=True, alpha=0.5,
    )  # fmt: skip
    torch.testing.assert_close(actual, expected)


def test_the_module_keeps_its_options():
    module = LigerFusedLinearDPOLoss(7, 0.2, 0.5, True, False, False, True, 3, "hinge", 0.0, 0.1)
    assert {name: value for name, value in vars(module).items() if name[0] != "_"} == {
        "training": True,
        "ignore_index": 7,
        "beta": 0.2,
        "alpha": 0.5,
        "compute_nll_loss": True,
        "compiled": False,
        "use_ref_model": False,
        "average_log_prob": True,
        "chunk_size": 3,
        "loss_type": "hinge",
        "label_smoothing": 0.0,
        "discopop_tau": 0.1,
    }


def test_an_answer_without_tokens_adds_nothing():
    (hidden, weight, bias), reference, labels = make_tensors()
    labels[P + 1] = -100
    for average in (False, True):
        loss, extras = liger_fused_linear_dpo(
            hidden, weight, labels, bias, *reference, average_log_prob=average
        )
        others = torch.tensor([0, 2, P, P + 2])
        part, _ = liger_fused_linear_dpo(
            hidden[others], weight, labels[others], bias, reference[0][others], *reference[1:],
            average_log_prob=average,
        )  # fmt: skip
        torch.testing.assert_close(loss, part * 2 / 3)
        assert extras[1][1] == extras[6][1] == 0
    labels[1] = -100
    message = r"^the number of scored tokens in target must be > 0 in cell 0 .* in pairs \[1\]"
    with pytest.raises(ValueError, match=message):
        liger_fused_linear_dpo(hidden, weight, labels, bias, *reference)


def test_a_batch_without_pairs_gives_zero_loss():
    (hidden, weight, bias), reference, labels = make_tensors()
    loss, extras = liger_fused_linear_dpo(
        hidden[:0], weight, labels[:0], bias, reference[0][:0], *reference[1:]
    )
    assert loss == 0
    assert [value.shape for value in extras[:2]] == [(0,), (0,)]


@pytest.mark.parametrize("loss_type", REFUSED_TYPES)
def test_losses_that_are_not_a_table_of_terms_are_refused(loss_type):
    message = (
        r"loss_type must be one of \['sigmoid', 'hinge', 'bco_pair', 'nca_pair'\] here, "
        rf"got '{loss_type}'. Compute it from sums of linear_logprob, or keep Liger's own loss"
    )
    (hidden, weight, bias), reference, labels = make_tensors()
    with pytest.raises(NotImplementedError, match=message):
        LigerFusedLinearDPOLoss(loss_type=loss_type, label_smoothing=0.1)
    with pytest.raises(NotImplementedError, match=message):
        liger_fused_linear_dpo(
            hidden, weight, labels, bias, *reference, loss_type=loss_type, label_smoothing=0.1
        )


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"loss_type": "ipo"}, r"Unsupported loss_type: .* got 'ipo'. Leave it out for 'sigmoid'"),
        (
            {"loss_type": "exo_pair"},
            r"label_smoothing must be > 0 for loss_type='exo_pair', got 0.0. Its paper",
        ),
        (
            {"loss_type": "robust", "label_smoothing": 0.5},
            r"label_smoothing must lie in \[0\.0, 0\.5\) for loss_type='robust', got 0.5.",
        ),
        (
            {"loss_type": "robust", "label_smoothing": -0.1},
            r"label_smoothing must lie in \[0\.0, 0\.5\) for loss_type='robust', got -0.1.",
        ),
    ],
)
def test_loss_types_of_liger_map_to_objectives(options, message):
    with pytest.raises(ValueError, match=message):
        LigerFusedLinearDPOLoss(**options)


def test_unused_label_smoothing_gives_a_warning():
    (hidden, weight, bias), reference, labels = make_tensors()
    with pytest.warns(UserWarning, match=r"label_smoothing=0.1 has no effect with .*'sigmoid'"):
        actual = liger_fused_linear_dpo(
            hidden, weight, labels, bias, *reference, label_smoothing=0.1
        )
    expected = liger_fused_linear_dpo(hidden, weight, labels, bias, *reference)
    torch.testing.assert_close(actual, expected)


NO_MODEL = {"ref_input": None, "ref_weight": None, "ref_bias": None}
REFUSED = {
    "another type of loss": ({"loss_type": None}, TypeError, "loss_type must be a string, got Non"),
    "a number as flag": (
        {"compute_nll_loss": 1.0},
        TypeError,
        "compute_nll_loss must be True or False, got float.",
    ),
    "no reference": (
        {"ref_input": None},
        ValueError,
        "ref_input must be given with use_ref_model=True, got None. .* or ref_logps=",
    ),
    "half a reference": (
        {"ref_weight": None},
        ValueError,
        "ref_weight must be given with use_ref_model=True, got None.",
    ),
    "two references": (
        {"ref_logps": torch.zeros(2, P)},
        ValueError,
        "ref_logps must be the only reference, got ref_input as well. Leave one of them out",
    ),
    "a reference and a part of another": (
        {"ref_logps": torch.zeros(2, P), "ref_input": None},
        ValueError,
        "ref_logps must be the only reference, got ref_weight as well. Leave one of them out",
    ),
    "a reference and none": (
        {"ref_logps": torch.zeros(2, P), **NO_MODEL, "use_ref_model": False},
        ValueError,
        "ref_logps must be the only reference, got use_ref_model=False as well.",
    ),
    "a transposed reference": (
        {"ref_logps": torch.zeros(P, 2), **NO_MODEL},
        ValueError,
        r"ref_logps must have shape \(2, 3\) to match _input, got \(3, 2\). Call torch.stack",
    ),
    "a pair of references": (
        {"ref_logps": (torch.zeros(P), torch.zeros(P)), **NO_MODEL},
        TypeError,
        r"ref_logps must be a torch.Tensor, got tuple of 2 tensors. Call torch.stack",
    ),
    "an odd batch": (
        {"_input": torch.zeros(5, T, D), "target": torch.zeros(5, T, dtype=torch.int64)},
        ValueError,
        r"_input must have shape \(2 \* P, T, D\), .* got \(5, 7, 16\). Stack both answers",
    ),
    "weight first": (
        {"_input": torch.zeros(V, D)},
        ValueError,
        r"_input must have shape .* got \(61, 16\). The module takes lin_weight first",
    ),
    "labels of another length": (
        {"target": torch.zeros(2 * P, T - 1, dtype=torch.int64)},
        ValueError,
        r"target must have shape \(6, 7\) to match _input, got \(6, 6\)",
    ),
    "a weight of another width": (
        {"weight": torch.zeros(V, D + 1)},
        ValueError,
        r"weight must have shape \(V, 16\) with V >= 1 to match _input, got \(61, 17\)",
    ),
    "a reference of another width": (
        {"ref_weight": torch.zeros(V, D + 1)},
        ValueError,
        r"ref_weight must have shape \(V, 16\) with V >= 1 to match ref_input, got \(61, 17\)",
    ),
    "no strength": ({"beta": 0.0}, ValueError, "beta must be finite and > 0, got 0.0."),
    "no factor": ({"alpha": None}, TypeError, "alpha must be a number, got NoneType."),
    "no ignored label": (
        {"ignore_index": None},
        TypeError,
        "ignore_index must be an int, got NoneType.",
    ),
}


@pytest.mark.parametrize(("change", "error", "message"), REFUSED.values(), ids=REFUSED)
def test_invalid_arguments_are_refused(change, error, message):
    (hidden, weight, bias), reference, labels = make_tensors(torch.float32)
    arguments = {
        "_input": hidden,
        "weight": weight,
        "target": labels,
        "bias": bias,
        "ref_input": reference[0],
        "ref_weight": reference[1],
        "ref_bias": reference[2],
    }
    with pytest.raises(error, match=message):
        liger_fused_linear_dpo(**arguments | change)


def test_the_module_compiles_into_one_graph():
    torch._dynamo.reset()
    (hidden, weight, bias), reference, labels = make_tensors()
    module = LigerFusedLinearDPOLoss(compute_nll_loss=True, average_log_prob=True)
    compiled = torch.compile(module, fullgraph=True, backend="aot_eager")
    arguments = (weight.requires_grad_(), hidden.requires_grad_(), labels, bias, *reference)
    results = [call(*arguments) for call in (compiled, module)]
    torch.testing.assert_close(*results)
    torch.testing.assert_close(
        *(torch.autograd.grad(loss, [hidden, weight]) for loss, _ in results)
    )


def test_an_fsdp_weight_is_gathered():
    (hidden, weight, bias), reference, labels = make_tensors()
    expected = liger_fused_linear_dpo(hidden, weight, labels, bias, *reference)
    dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)
    try:
        mesh = init_device_mesh("cpu", (1,))
        parts = [distribute_tensor(part, mesh, [Shard(0)]) for part in (weight, bias)]
        sharded, sharded_bias = (torch.nn.Parameter(part) for part in parts)
        actual = liger_fused_linear_dpo(hidden, sharded, labels, sharded_bias, *reference)
        torch.testing.assert_close(actual, expected)
        actual[0].backward()
        assert sharded.grad.full_tensor().any()
    finally:
        dist.destroy_process_group()


@pytest.mark.parametrize("dtype", BOUNDS, ids=str)
@pytest.mark.parametrize("return_entropy", [False, True])
@pytest.mark.parametrize("ignore_index", [-100, 42])
@pytest.mark.usefixtures("each_backend")
def test_scaled_cross_entropy_equals_float64(ignore_index, return_entropy, dtype):
    (hidden, weight, _), _, labels = make_tensors(dtype, ignore_index=ignore_index)
    rows, labels = hidden.flatten(0, 1), labels.flatten()
    leaves, exact = as_leaves([rows, weight]), as_leaves([rows, weight], torch.float64)
    result = LigerFusedLinearScaledCrossEntropyFunction.apply(
        *leaves, labels, 0.7, ignore_index, 1, return_entropy
    )
    assert isinstance(result, tuple) is return_entropy
    results = result if return_entropy else (result,)
    logits = exact[0] @ exact[1].T / 0.7
    log_probs, is_scored = logits.log_softmax(dim=1), labels != ignore_index
    expected = (
        F.cross_entropy(logits, labels, reduction="none", ignore_index=ignore_index),
        torch.where(is_scored, -(log_probs.exp() * log_probs).sum(dim=1), 0.0),
    )
    bound, bound_of_gradients = BOUNDS[dtype]
    total, oracle = 0.0, 0.0
    for value, right, slope in zip(results, expected, (1.0, -0.4), strict=False):
        assert (value.dtype, value.shape) == (torch.float32, labels.shape)
        assert (value - right).abs().max() <= bound
        assert not value[~is_scored].signbit().any()
        total, oracle = total + slope * value.square().sum(), oracle + slope * right.square().sum()
    total.backward()
    oracle.backward()
    for tensor, right in zip(leaves, exact, strict=True):
        assert (tensor.grad - right.grad).norm() <= bound_of_gradients * right.grad.norm()


def test_scaled_cross_entropy_refuses_invalid_arguments():
    (hidden, weight, _), _, labels = make_tensors()
    apply = LigerFusedLinearScaledCrossEntropyFunction.apply
    message = r"selected_token_ids must be None, got Tensor of shape \(2,\). linear_logprob scores"
    with pytest.raises(NotImplementedError, match=message):
        apply(hidden, weight, labels, selected_token_ids=torch.tensor([1, 2]))
    with pytest.raises(TypeError, match="return_entropy must be True or False, got int"):
        apply(hidden, weight, labels, 1.0, -100, 1, 1)
    with pytest.raises(ValueError, match=r"temperature must be finite and > 0, got 0.0"):
        apply(hidden, weight, labels, 0.0)
    with pytest.raises(ValueError, match=r"target must have shape \(6, 7\) to match _input"):
        apply(hidden, weight, labels[:, 1:])
