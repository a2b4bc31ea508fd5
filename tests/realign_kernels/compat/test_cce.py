"""Cut Cross-Entropy's signature against dense cross entropy in float64."""

from __future__ import annotations

from types import SimpleNamespace

import pytest
import torch
import torch.nn.functional as F

from realign_kernels.compat.cce import LinearCrossEntropy, linear_cross_entropy

B, T, V, D = 3, 7, 61, 16
F64, F32, BF16 = torch.float64, torch.float32, torch.bfloat16
REDUCTIONS = ("none", "mean", "sum")


def make_call(dtype, *, bias=False):
    """Return the tensors that get gradients, and targets."""
    tensors = [torch.randn(B, T, D), torch.randn(V, D) / 2]
    if bias:
        tensors.append(torch.randn(V))
    targets = torch.randint(0, V, (B, T))
    targets.view(-1)[::4] = -100
    return [tensor.to(dtype) for tensor in tensors], targets


def dense(e, c, targets, *, bias=None, softcap=None, reduction="mean", shift=0):
    """Return loss and log-sum-exp as anyone would write them."""
    e, targets = e[:, : T - int(shift)], targets[:, int(shift) :]
    logits = F.linear(e, c, bias)
    if softcap is not None:
        logits = softcap * torch.tanh(logits / softcap)
    loss = F.cross_entropy(logits.flatten(0, 1), targets.flatten(), reduction=reduction)
    lse = torch.where(targets == -100, 0, logits.logsumexp(-1))
    return (loss.view(targets.shape) if reduction == "none" else loss), lse


def with_gradients(function, tensors, targets, dtype, **options):
    """Return loss, lse, and the gradients of a sum of both, at a dtype."""
    leaves = [tensor.to(dtype).requires_grad_() for tensor in tensors]
    bias = leaves[2] if len(leaves) == 3 else None
    loss, lse = function(*leaves[:2], targets, bias=bias, **options)
    upstream = [
        torch.linspace(0.5, 1.5, part.numel(), dtype=F64).reshape(part.shape).to(part.dtype)
        for part in (loss, lse)
    ]
    return loss.detach(), lse.detach(), torch.autograd.grad([loss, lse], leaves, upstream)


def ours(*arguments, **options):
    return linear_cross_entropy(*arguments, return_lse=True, **options)


@pytest.mark.parametrize(
    ("dtype", "value_error", "grad_error"),
    [(F64, 1e-12, 1e-12), (F32, 1e-5, 1e-6), (BF16, 1e-4, 2.5e-3)],
    ids=str,
)
@pytest.mark.parametrize("reduction", REDUCTIONS)
@pytest.mark.parametrize("shift", [0, True, 3])
@pytest.mark.parametrize(
    "case", [{}, {"bias": True}, {"softcap": 2.0}, {"bias": True, "softcap": 5.0}], ids=str
)
@pytest.mark.usefixtures("each_backend")
def test_values_and_gradients_are_close_to_float64(
    case, shift, reduction, dtype, value_error, grad_error
):
    options = {"softcap": case.get("softcap"), "reduction": reduction, "shift": shift}
    tensors, targets = make_call(dtype, bias="bias" in case)
    loss, lse, grads = with_gradients(ours, tensors, targets, dtype, **options)
    exact, exact_lse, exact_grads = with_gradients(dense, tensors, targets, F64, **options)
    assert loss.dtype == lse.dtype == (F64 if dtype == F64 else F32)
    assert lse.shape == (B, T - int(shift))
    tokens = B * T if reduction == "sum" else 1
    torch.testing.assert_close(loss.double(), exact, rtol=0, atol=value_error * tokens)
    torch.testing.assert_close(lse.double(), exact_lse, rtol=0, atol=value_error)
    for grad, expected in zip(grads, exact_grads, strict=True):
        assert grad.dtype == dtype
        assert (grad.double() - expected).norm() <= grad_error * expected.norm()


@pytest.mark.parametrize("shift", [0, 2])
@pytest.mark.parametrize("reduction", REDUCTIONS)
@pytest.mark.usefixtures("each_backend")
def test_the_loss_without_the_lse_equals_the_loss_with_it(reduction, shift):
    tensors, targets = make_call(F32)
    options = {"reduction": reduction, "shift": shift}
    loss = linear_cross_entropy(*tensors, targets, **options)
    beside = ours(*tensors, targets, **options)[0]
    torch.testing.assert_close(loss, beside, rtol=1e-6, atol=1e-6)


@pytest.mark.parametrize("shift", [0, 1])
@pytest.mark.parametrize("reduction", REDUCTIONS)
@pytest.mark.usefixtures("each_backend")
def test_ignored_positions_have_zero_gradient_and_value(reduction, shift):
    (e, c), targets = make_call(F32)
    is_ignored = targets[:, shift:] == -100
    e[:, : T - shift][is_ignored] = 1e30
    e.requires_grad_()
    loss, lse = ours(e, c, targets, reduction=reduction, shift=shift)
    (loss.sum() + lse.square().sum()).backward()
    grad = e.grad[:, : T - shift]
    assert torch.equal(grad[is_ignored], torch.zeros_like(grad[is_ignored]))
    assert grad[~is_ignored].any(dim=1).all()
    assert not e.grad[:, T - shift :].any()
    assert not lse[is_ignored].any()
    if reduction == "none":
        assert not loss[is_ignored].any()
        assert not loss[is_ignored].signbit().any()


def test_another_ignore_index_gives_the_same_loss():
    (e, c), targets = make_call(F64)
    expected = linear_cross_entropy(e, c, targets)
    actual = linear_cross_entropy(e, c, targets.where(targets >= 0, -1), ignore_index=-1)
    assert torch.equal(actual, expected)


def test_the_mean_of_no_target_is_nan():
    e, c = torch.randn(B, T, D).requires_grad_(), torch.randn(V, D)
    targets = torch.full((B, T), -100)
    loss = linear_cross_entropy(e, c, targets)
    assert loss.isnan()
    loss.backward()
    assert not e.grad.any()
    assert linear_cross_entropy(e, c, targets, reduction="sum") == 0
    assert linear_cross_entropy(e[:0], c, targets[:0]).isnan()


def test_the_lse_has_its_own_gradient():
    (e, c, bias), targets = make_call(F64, bias=True)
    targets = targets[:2, :4].clamp(max=4)

    def lse(e, c, bias):
        return ours(e, c, targets, bias=bias, shift=1, softcap=3.0)[1]

    leaves = e[:2, :4, :3], c[:5, :3], bias[:5]
    assert torch.autograd.gradcheck(lse, [leaf.clone().requires_grad_() for leaf in leaves])


def test_rows_without_a_batch_and_a_single_token_are_accepted():
    (e, c), targets = make_call(F64)
    losses = linear_cross_entropy(e, c, targets, reduction="none")
    flat = linear_cross_entropy(e.flatten(0, 1), c, targets.flatten(), reduction="none")
    assert torch.equal(flat.view(B, T), losses)
    one = linear_cross_entropy(e[1, 2], c, targets[1, 2], reduction="none")
    assert one.shape == ()
    torch.testing.assert_close(one, losses[1, 2])


def test_filter_sum_and_implementation_options_are_ignored():
    (e, c), targets = make_call(F32)
    loss = linear_cross_entropy(
        e, c, targets, filter_eps="high", use_kahan=True, accum_e_fp32=True, accum_c_fp32=True,
        filter_e_grad=False, filter_c_grad=False, impl="cce_kahan_full_c",
    )  # fmt: skip
    assert torch.equal(loss, linear_cross_entropy(e, c, targets))


def test_the_function_compiles_into_one_graph():
    tensors, targets = make_call(F32, bias=True)
    torch._dynamo.reset()
    compiled = torch.compile(ours, fullgraph=True, backend="aot_eager")
    for reduction in REDUCTIONS:
        options = {"reduction": reduction, "shift": 1, "softcap": 3.0}
        actual = with_gradients(compiled, tensors, targets, F32, **options)
        expected = with_gradients(ours, tensors, targets, F32, **options)
        torch.testing.assert_close(actual, expected, rtol=1e-6, atol=1e-7)


def test_module_options_can_be_set_after_construction():
    """Options are attributes, as in Cut Cross-Entropy."""
    (e, c), targets = make_call(F32)
    module = LinearCrossEntropy()
    assert (module.reduction, module.ignore_index, module.filter_eps) == ("mean", -100, "auto")
    module.reduction, module.shift = "none", 1
    expected = linear_cross_entropy(e, c, targets, reduction="none", shift=1)
    assert torch.equal(module(e, c, targets), expected)


def test_the_module_stores_its_options():
    (e, c, bias), targets = make_call(F32, bias=True)
    module = LinearCrossEntropy(-100, 4.0, "none", shift=1, return_lse=True, filter_eps=None)
    actual = module(e, c, targets, bias)
    expected = ours(e, c, targets, bias=bias, softcap=4.0, reduction="none", shift=1)
    torch.testing.assert_close(actual, expected, rtol=0, atol=0)
    assert torch.equal(LinearCrossEntropy()(e, c, targets), linear_cross_entropy(e, c, targets))
    with pytest.raises(TypeError, match=r"got 4 positional ones\. The fourth is filter_eps .* and"):
        LinearCrossEntropy(-100, None, "mean", True)
    with pytest.raises(TypeError, match=r"got 'temperature'\. It takes \['accum_c_fp32', "):
        LinearCrossEntropy(temperature=2.0)


REFUSED = {
    "shards by another name": (
        {"vocab_parallel_options": SimpleNamespace(start=0, stop=30)},
        NotImplementedError,
        r"vocab_parallel_options must be None, got types's SimpleNamespace\. Pass group=",
    ),
    "a negative shift": (
        {"shift": -1},
        ValueError,
        r"shift must be in \[0, 7\) to match the last dimension of targets, got -1\. Pass 1 for",
    ),
    "a shift past the end": ({"shift": T}, ValueError, r"shift must be in \[0, 7\) .*, got 7\."),
    "a shift of one position": (
        {"e": torch.zeros(B, 1, D), "targets": torch.zeros(B, 1, dtype=torch.int64), "shift": True},
        ValueError,
        r"shift must be in \[0, 1\) .*, got True\. Pass 1 for the next token, with at least",
    ),
    "a shift of no whole number": ({"shift": 1.0}, TypeError, "shift must be an int, got float"),
    "targets that are shifted already": (
        {"shift": 1, "targets": torch.zeros(B, T - 1, dtype=torch.int64)},
        ValueError,
        r"targets must have shape \(3, 7\) to match e, got \(3, 6\)\. With shift= neither is",
    ),
    "targets of another shape": (
        {"targets": torch.zeros(B, T - 1, dtype=torch.int64)},
        ValueError,
        r"targets must have shape \(3, 7\) to match e, got \(3, 6\)\. Shift both alike: e\[:, :-1\]"
        r" and targets\[:, 1:\]",
    ),
    "a dtype of targets": (
        {"targets": torch.zeros(B, T, dtype=torch.int32)},
        TypeError,
        r"targets must be torch\.int64, got torch\.int32\. Call \.long\(\)",
    ),
    "a target of no token": (
        {"targets": torch.full((B, T), V)},
        ValueError,
        r"targets must be in \[0, V\) or ignore_index -100, got 61 at index \(0, 0\)",
    ),
    "a width": (
        {"c": torch.zeros(V, D + 1)},
        ValueError,
        r"c must have shape \(V, 16\) with V >= 1 to match e, got \(61, 17\)",
    ),
    "a bias": (
        {"bias": torch.zeros(V - 1)},
        ValueError,
        r"bias must have shape \(61,\) to match c, got \(60,\)",
    ),
    "a cap": ({"softcap": 0.0}, ValueError, r"softcap must be finite and > 0, got 0\.0"),
    "a reduction": (
        {"reduction": "average"},
        ValueError,
        r"reduction must be one of \['none', 'mean', 'sum'\], got 'average'",
    ),
    "logits": (
        {"e": torch.zeros(B, T, V)},
        ValueError,
        r"c must have shape \(V, 61\) .*, got \(61, 16\)\. Pass what the last layer returns, not",
    ),
    "a flag": ({"return_lse": 1}, TypeError, "return_lse must be True or False, got int"),
    "no tensor": ({"e": None}, TypeError, r"e must be a torch\.Tensor, got NoneType"),
    "no index": (
        {"ignore_index": None, "targets": torch.zeros(B, T, dtype=torch.int64)},
        TypeError,
        "ignore_index must be an int, got NoneType",
    ),
    "an index": (
        {"ignore_index": 0.5},
        TypeError,
        "ignore_index must be an int, got float",
    ),
    "a group of no kind": (
        {"group": "world"},
        TypeError,
        r"group must be a torch\.distributed\.ProcessGroup or None, got 'world'",
    ),
}


@pytest.mark.parametrize(("changed", "error", "message"), REFUSED.values(), ids=REFUSED)
def test_invalid_arguments_are_refused(changed, error, message):
    (e, c), targets = make_call(F32)
    with pytest.raises(error, match=message):
        linear_cross_entropy(**{"e": e, "c": c, "targets": targets} | changed)


@pytest.mark.parametrize("fourth", [-100, None, torch.zeros(V)], ids=["index", "None", "bias"])
def test_an_ambiguous_fourth_positional_argument_is_refused(fourth):
    (e, c), targets = make_call(F32)
    message = (
        r"linear_cross_entropy must get arguments after targets by name, got 4 positional ones\. "
        r"The fourth is ignore_index in Cut Cross-Entropy 25\.1\.1 and bias in 25\.6\.4"
    )
    with pytest.raises(TypeError, match=message):
        linear_cross_entropy(e, c, targets, fourth)
