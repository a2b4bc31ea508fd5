"""torch's signature against torch's own function, or against its parts where torch is older."""

from __future__ import annotations

from types import SimpleNamespace

import pytest
import torch
import torch.nn.functional as F
from torch.autograd import forward_ad

from realign_kernels.compat.torch import linear_cross_entropy

pytestmark = pytest.mark.usefixtures("each_backend")

N, V, D = 23, 61, 16
F64, F32, F16, BF16 = torch.float64, torch.float32, torch.float16, torch.bfloat16
REDUCTIONS = ("none", "mean", "sum")
CASES = {
    "plain": {},
    "bias": {"bias": True},
    "weight": {"weight": True},
    "ignored": {"ignore_index": 7},
    "all": {"bias": True, "weight": True, "ignore_index": -3},
}


def composed(hidden, lm_head_weight, target, *, linear_bias=None, ignore_index=None, **options):
    """Return what torch's function is documented to compute, from its two parts."""
    if ignore_index is not None:
        options["ignore_index"] = ignore_index
    return F.cross_entropy(F.linear(hidden, lm_head_weight, linear_bias), target, **options)


torchs_own = getattr(F, "linear_cross_entropy", composed)  # PyTorch 2.10 has none


def make_call(dtype, *, bias=False, weight=False, ignore_index=None):
    """Return the tensors that get gradients, the targets, and the other arguments."""
    tensors = [torch.randn(N, D), torch.randn(V, D) / 2]
    if bias:
        tensors.append(torch.randn(V))
    target = torch.randint(0, V, (N,))
    target[::4] = -100 if ignore_index is None else ignore_index
    options = {"ignore_index": ignore_index}
    if weight:
        options["weight"] = (torch.rand(V) + 0.5).to(dtype)
    return [tensor.to(dtype) for tensor in tensors], target, options


def run(function, tensors, target, options, dtype, **extra):
    """Return the loss and the gradients of its inputs, at a dtype."""
    leaves = [tensor.to(dtype).requires_grad_() for tensor in tensors]
    options = {
        name: value.to(dtype) if isinstance(value, torch.Tensor) else value
        for name, value in options.items()
    }
    bias = leaves[2] if len(leaves) == 3 else None
    loss = function(*leaves[:2], target, linear_bias=bias, **options, **extra)
    upstream = torch.linspace(0.5, 1.5, loss.numel(), dtype=F64).reshape(loss.shape)
    return loss.detach(), torch.autograd.grad(loss, leaves, upstream.to(loss.dtype))


def distance(actual, expected):
    """Return how far a gradient is from another, relative to it."""
    return ((actual.double() - expected).norm() / expected.norm()).item()


@pytest.mark.parametrize("case", CASES.values(), ids=CASES)
def test_the_composed_parts_equal_torchs_function(case):
    call = make_call(F64, **case)
    torch.testing.assert_close(run(composed, *call, F64), run(torchs_own, *call, F64))


@pytest.mark.parametrize("reduction", REDUCTIONS)
@pytest.mark.parametrize("case", CASES.values(), ids=CASES)
def test_values_and_gradients_equal_torch_in_float64(case, reduction):
    call = make_call(F64, **case)
    loss, grads = run(linear_cross_entropy, *call, F64, reduction=reduction)
    own, own_grads = run(torchs_own, *call, F64, reduction=reduction)
    torch.testing.assert_close(loss, own, rtol=1e-12, atol=1e-12)
    torch.testing.assert_close(grads, own_grads, rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize(
    ("dtype", "value_error", "grad_error"), [(F32, 1e-5, 1e-6), (BF16, 1e-4, 2.5e-3)], ids=str
)
@pytest.mark.parametrize("reduction", REDUCTIONS)
@pytest.mark.parametrize("case", CASES.values(), ids=CASES)
def test_values_and_gradients_are_close_to_float64(case, reduction, dtype, value_error, grad_error):
    call = make_call(dtype, **case)
    loss, grads = run(linear_cross_entropy, *call, dtype, reduction=reduction, out_dtype=F32)
    exact, exact_grads = run(torchs_own, *call, F64, reduction=reduction)
    assert loss.dtype == F32
    tokens = N if reduction == "sum" else 1
    torch.testing.assert_close(loss.double(), exact, rtol=1e-6, atol=value_error * tokens)
    for grad, expected in zip(grads, exact_grads, strict=True):
        assert grad.dtype == dtype
        assert distance(grad, expected) <= grad_error


@pytest.mark.parametrize("reduction", REDUCTIONS)
@pytest.mark.parametrize("dtype", [F64, F32, F16, BF16], ids=str)
def test_the_result_dtype_equals_that_of_torch(dtype, reduction):
    """The result is also at least as near to float64 as that of torch."""
    call = make_call(dtype, bias=True)
    exact, _ = run(torchs_own, *call, F64, reduction=reduction)
    loss, _ = run(linear_cross_entropy, *call, dtype, reduction=reduction)
    own, _ = run(torchs_own, *call, dtype, reduction=reduction)
    assert loss.dtype == own.dtype == dtype
    rounding = max(torch.finfo(dtype).eps, 1e-14) * (exact.abs() + exact.numel())
    assert ((loss.double() - exact).abs() <= rounding).all()
    if dtype in (F16, BF16):
        assert (loss.double() - exact).norm() <= (own.double() - exact).norm()


def test_the_result_dtype_under_autocast_equals_that_of_torch():
    tensors, target, _ = make_call(F32)
    for dtype in (BF16, F16):
        with torch.autocast("cpu", dtype=dtype):
            own = torchs_own(*tensors, target)
            loss = linear_cross_entropy(*tensors, target)
        assert loss.dtype == own.dtype
        exact = torchs_own(*(tensor.to(dtype).double() for tensor in tensors), target)
        torch.testing.assert_close(loss.double(), exact, rtol=1e-5, atol=0)


@pytest.mark.parametrize("out_dtype", [F64, F32, F16, BF16], ids=str)
def test_the_dtype_of_the_result_can_be_chosen(out_dtype):
    tensors, target, _ = make_call(F32)
    loss = linear_cross_entropy(*tensors, target, out_dtype=out_dtype)
    assert loss.dtype == out_dtype
    assert loss == linear_cross_entropy(*tensors, target).to(out_dtype)


def test_a_weight_of_another_dtype_is_rounded():
    (hidden, weight), target, _ = make_call(F32)
    loss = linear_cross_entropy(hidden.to(BF16), weight, target, out_dtype=F32)
    exact = torchs_own(hidden.to(BF16).double(), weight.to(BF16).double(), target)
    torch.testing.assert_close(loss.double(), exact, rtol=1e-5, atol=0)


def test_one_sample_and_any_number_of_dimensions_are_accepted():
    (hidden, weight), target, _ = make_call(F64)
    target = target.clamp(min=0)
    losses = linear_cross_entropy(hidden, weight, target, reduction="none")
    one = linear_cross_entropy(hidden[3], weight, target[3], reduction="none")
    assert one.shape == ()
    torch.testing.assert_close(one, torchs_own(hidden[3], weight, target[3]))
    many = linear_cross_entropy(
        hidden[:20].reshape(2, 5, 2, D), weight, target[:20].reshape(2, 5, 2), reduction="none"
    )
    torch.testing.assert_close(many, losses[:20].reshape(2, 5, 2))


def test_the_default_ignore_index_equals_that_of_torch():
    (hidden, weight), target, _ = make_call(F64)
    assert (target == -100).any()
    for ignore_index in (None, -100):
        loss = linear_cross_entropy(hidden, weight, target, ignore_index=ignore_index)
        torch.testing.assert_close(loss, torchs_own(hidden, weight, target))


@pytest.mark.parametrize("weighted", [False, True])
@pytest.mark.parametrize("reduction", REDUCTIONS)
def test_ignored_samples_have_no_gradient(reduction, weighted):
    tensors, target, options = make_call(F32, weight=weighted, ignore_index=5)
    tensors[0][target == 5] = 1e30
    if weighted:
        options["weight"][0] = torch.inf
        target[target == 0] = 1
    loss, (grad, _) = run(linear_cross_entropy, tensors, target, options, F32, reduction=reduction)
    assert torch.isfinite(loss).all()
    assert grad[target != 5].ne(0).any(dim=1).all()
    assert torch.equal(grad[target == 5], torch.zeros_like(grad[target == 5]))
    if reduction == "none":
        assert torch.equal(loss[target == 5].signbit(), torch.zeros(6, dtype=torch.bool))


def test_the_mean_of_no_target_equals_that_of_torch():
    for rows in (0, 4):
        leaves = [torch.randn(rows, D).requires_grad_(), torch.randn(V, D).requires_grad_()]
        target = torch.full((rows,), -100)
        own = torchs_own(*leaves, target)
        loss = linear_cross_entropy(*leaves, target)
        assert loss.isnan()
        assert own.isnan()
        for grad in torch.autograd.grad(loss, leaves):
            assert not grad.any()
        total = linear_cross_entropy(*leaves, target, reduction="sum")
        assert torch.equal(total, torchs_own(*leaves, target, reduction="sum"))


def test_class_weights_have_a_gradient():
    (hidden, weight), target, _ = make_call(F64)

    def loss(factors):
        return linear_cross_entropy(hidden, weight, target, weight=factors)

    assert torch.autograd.gradcheck(loss, [(torch.rand(V, dtype=F64) + 0.5).requires_grad_()])


def test_chunking_options_are_ignored():
    tensors, target, _ = make_call(F64)
    options_of = getattr(torch.nn, "LinearCrossEntropyOptions", SimpleNamespace)
    options = options_of(batch_chunk_size=2)
    loss = linear_cross_entropy(*tensors, target, options=options)
    assert torch.equal(loss, linear_cross_entropy(*tensors, target))


def test_the_function_compiles_into_one_graph():
    tensors, target, options = make_call(F32, bias=True, weight=True)
    torch._dynamo.reset()
    compiled = torch.compile(linear_cross_entropy, fullgraph=True, backend="aot_eager")
    for reduction in REDUCTIONS:
        actual = run(compiled, tensors, target, options, F32, reduction=reduction)
        expected = run(linear_cross_entropy, tensors, target, options, F32, reduction=reduction)
        torch.testing.assert_close(actual, expected, rtol=1e-6, atol=1e-7)


PROBABILITIES = torch.full((N, V), 1 / V)
OTHER = r"Call torch\.nn\.functional\.linear_cross_entropy for it\."
REFUSED = {
    "smoothing": (
        {"label_smoothing": 0.1},
        NotImplementedError,
        rf"label_smoothing must be 0, got 0\.1\. {OTHER}",
    ),
    "smoothing of no number": (
        {"label_smoothing": None},
        TypeError,
        "label_smoothing must be a number, got NoneType",
    ),
    "more than one output a class": (
        {"linear_weight": torch.zeros(V, 2, D)},
        NotImplementedError,
        rf"linear_weight must have shape \(V, D\), got \(61, 2, 16\)\. {OTHER}",
    ),
    "probabilities": (
        {"target": PROBABILITIES},
        NotImplementedError,
        rf"target must hold class indices, got probabilities of shape \(23, 61\) and dtype "
        rf"torch\.float32\. {OTHER}",
    ),
    "a dtype of targets": (
        {"target": torch.zeros(N, dtype=torch.int32)},
        TypeError,
        r"target must be torch\.int64, got torch\.int32\. Call \.long\(\)",
    ),
    "number of targets": (
        {"target": torch.zeros(N - 1, dtype=torch.int64)},
        ValueError,
        r"target must have shape \(23,\) to match input, got \(22,\)",
    ),
    "an index of no class": (
        {"target": torch.full((N,), V)},
        ValueError,
        r"target must be in \[0, V\) or ignore_index -100, got 61 at index \(0,\) with V = 61. "
        "Are the labels those of this tokenizer",
    ),
    "width": (
        {"linear_weight": torch.zeros(V, D + 1)},
        ValueError,
        r"linear_weight must have shape \(V, 16\) with V >= 1 to match input, got \(61, 17\)",
    ),
    "no tensor": (
        {"input": [1.0]},
        TypeError,
        r"input must be a torch\.Tensor, got list\. Call torch\.as_tensor",
    ),
    "a module": (
        {"linear_weight": torch.nn.Linear(D, V)},
        TypeError,
        r"linear_weight must be a torch\.Tensor, got torch's Linear\. Pass its \.weight",
    ),
    "a bias": (
        {"linear_bias": torch.zeros(V + 1)},
        ValueError,
        r"linear_bias must have shape \(61,\) to match linear_weight, got \(62,\)",
    ),
    "class weights": (
        {"weight": torch.ones(V - 1)},
        ValueError,
        r"weight must have shape \(61,\) to match linear_weight, got \(60,\)\. Give one factor",
    ),
    "class weights of integers": (
        {"weight": torch.ones(V, dtype=torch.int64)},
        TypeError,
        r"weight must be of a floating dtype, got torch\.int64\. Call \.float\(\)",
    ),
    "class weights elsewhere": (
        {"weight": torch.ones(V, device="meta")},
        ValueError,
        r"weight must be on cpu to match linear_weight, got meta\. Call \.to\('cpu'\)",
    ),
    "reduction": (
        {"reduction": "average"},
        ValueError,
        r"reduction must be one of \['none', 'mean', 'sum'\], got 'average'",
    ),
    "ignore_index": (
        {"ignore_index": 1.5},
        TypeError,
        "ignore_index must be an int, got float",
    ),
    "out_dtype": (
        {"out_dtype": torch.int64},
        TypeError,
        r"out_dtype must be a floating torch\.dtype or None, got torch\.int64\. Pass torch",
    ),
    "out_dtype of no dtype": (
        {"out_dtype": "float32"},
        TypeError,
        r"out_dtype must be a floating torch\.dtype or None, got 'float32'",
    ),
}


@pytest.mark.parametrize(("changed", "error", "message"), REFUSED.values(), ids=REFUSED)
def test_invalid_arguments_are_refused(changed, error, message):
    (hidden, weight), target, _ = make_call(F32)
    given = {"input": hidden, "linear_weight": weight, "target": target} | changed
    with pytest.raises(error, match=message):
        linear_cross_entropy(**given)


@pytest.mark.filterwarnings("ignore")  # of torch, at the first tangent
def test_tangents_and_second_derivatives_are_refused():
    (hidden, weight), target, _ = make_call(F64)
    with (
        forward_ad.dual_level(),
        pytest.raises(NotImplementedError, match="input must carry no forward-mode tangent"),
    ):
        linear_cross_entropy(forward_ad.make_dual(hidden, hidden), weight, target)
    hidden.requires_grad_()
    loss = linear_cross_entropy(hidden, weight, target)
    (grad,) = torch.autograd.grad(loss, hidden, create_graph=True)
    with pytest.raises(NotImplementedError, match="must be differentiated once"):
        grad.sum().backward()
