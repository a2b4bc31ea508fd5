"""Gradients of the head: gradcheck, arbitrary upstream gradients, and which inputs get one."""

from __future__ import annotations

import itertools

import pytest
import torch
import torch.utils.checkpoint

from realign_kernels import linear_logprob, linear_logprob_stats
from realign_kernels.testing import dense_log_probs, dense_logprob, make_head_inputs, seeded

pytestmark = pytest.mark.usefixtures("each_backend")

HEADS = [{"bias": bias, "rank": rank} for bias in (False, True) for rank in (0, 2)]
TRANSFORMS = [
    {},
    {"logit_scale": 0.4},
    {"logit_softcap": 4.0},
    {"temperature": 0.6},
    {"logit_scale": 1.6, "logit_softcap": 3.0, "temperature": 1.4},
]


def gradients(function, inputs, upstream, **extra):
    leaves = inputs.as_leaves()
    output = function(leaves, **extra)
    return torch.autograd.grad(output, leaves.tensors, upstream)


def ours(inputs, **extra):
    return inputs.call(linear_logprob, **extra)


@pytest.mark.parametrize("head", HEADS, ids=str)
@pytest.mark.parametrize("transform", TRANSFORMS, ids=str)
@pytest.mark.usefixtures("small_tiles")
def test_gradcheck(head, transform):
    inputs = make_head_inputs(6, 19, 3, ignored=0.2, logit_std=1.0, **head, **transform)
    leaves = inputs.as_leaves()

    def scores(*tensors):
        stats = inputs.replace_tensors(tensors).call(linear_logprob_stats)
        return stats.token_logps, stats.top_non_label_logps

    assert torch.autograd.gradcheck(scores, leaves.tensors)


@pytest.mark.parametrize(
    "start", [0, *(pytest.param(start, marks=pytest.mark.full) for start in range(20, 200, 20))]
)
def test_gradcheck_of_random_shapes(start):
    """K01: the 200 shapes have every combination of head options."""
    for seed in range(start, start + 20):
        generator = seeded(seed)
        N, V, D = (int(torch.randint(1, 8, (), generator=generator)) for _ in range(3))
        options = TRANSFORMS[seed % len(TRANSFORMS)]
        leaves = make_head_inputs(
            N, V, D, seed=seed, ignored=0.3, bias=bool(seed & 1), rank=seed & 2, logit_std=1.0,
            **options,
        ).as_leaves()  # fmt: skip
        memory = ("auto", "stash", "recompute")[seed % 3]
        assert torch.autograd.gradcheck(
            lambda *tensors, leaves=leaves, memory=memory: leaves.replace_tensors(tensors).call(
                linear_logprob, memory=memory
            ),
            leaves.tensors,
        )


@pytest.mark.parametrize("upstream", ["random", "ones", "zeros", "one hot", "stride 0"])
@pytest.mark.usefixtures("small_tiles")
def test_any_upstream_gradient_is_applied(upstream):
    inputs = make_head_inputs(11, 37, 5, ignored=0.2, bias=True, rank=2, logit_softcap=6.0)
    grad = {
        "random": torch.randn(11, dtype=torch.float64),
        "ones": torch.ones(11, dtype=torch.float64),
        "zeros": torch.zeros(11, dtype=torch.float64),
        "one hot": torch.eye(11, dtype=torch.float64)[7],
        "stride 0": torch.tensor(-0.3, dtype=torch.float64).expand(11),
    }[upstream]
    actual = gradients(ours, inputs, grad)
    expected = gradients(dense_logprob, inputs, grad)
    torch.testing.assert_close(actual, expected)


def test_the_upstream_gradient_of_a_later_loss_is_applied():
    """A loss that mixes positions nonlinearly, as preference losses do."""
    inputs = make_head_inputs(12, 29, 4, ignored=0.2)

    def loss(scorer):
        leaves = inputs.as_leaves()
        token_logps = scorer(leaves).view(3, 4)
        (torch.tanh(token_logps.sum(1)).prod() + token_logps[:, 0].square().sum()).backward()
        return [leaf.grad for leaf in leaves.tensors]

    torch.testing.assert_close(loss(ours), loss(dense_logprob))


def test_gradients_of_both_outputs_add_up():
    inputs = make_head_inputs(9, 23, 4, ignored=0.2, bias=True)
    weights = torch.randn(2, 9, dtype=torch.float64)
    leaves = inputs.as_leaves()
    stats = leaves.call(linear_logprob_stats)
    (weights[0] @ stats.token_logps + weights[1] @ stats.top_non_label_logps).backward()

    dense = inputs.as_leaves()
    index = torch.where(inputs.labels == -100, 0, inputs.labels)[:, None]
    log_probs = dense_log_probs(dense)
    tops = log_probs.scatter(1, index, -torch.inf).amax(1)
    picked = weights[0] * log_probs.gather(1, index)[:, 0] + weights[1] * tops
    picked[inputs.labels != -100].sum().backward()
    for actual, expected in zip(leaves.tensors, dense.tensors, strict=True):
        torch.testing.assert_close(actual.grad, expected.grad)


@pytest.mark.parametrize(
    "needed", list(itertools.product([False, True], repeat=5)), ids=lambda needed: str(needed)
)
def test_only_inputs_that_require_grad_get_a_gradient(needed):
    inputs = make_head_inputs(7, 19, 4, ignored=0.2, bias=True, rank=2).as_leaves()
    whole = torch.autograd.grad(inputs.call(linear_logprob).sum(), inputs.tensors)
    for tensor, is_needed in zip(inputs.tensors, needed, strict=True):
        tensor.requires_grad_(is_needed)
    token_logps = inputs.call(linear_logprob)
    assert token_logps.requires_grad == any(needed)
    if any(needed):
        token_logps.sum().backward()
    for tensor, is_needed, expected in zip(inputs.tensors, needed, whole, strict=True):
        assert (tensor.grad is not None) == is_needed
        assert not is_needed or torch.equal(tensor.grad, expected)


def test_ignored_positions_get_exactly_no_gradient():
    inputs = make_head_inputs(9, 23, 4).as_leaves()
    inputs.labels[[0, 4, 8]] = -100
    inputs.call(linear_logprob).backward(torch.randn(9, dtype=torch.float64))
    is_zero = (inputs.hidden_states.grad == 0).all(dim=1)
    assert is_zero.tolist() == [row in (0, 4, 8) for row in range(9)]


@pytest.mark.parametrize("N", [0, 6])
def test_a_batch_without_scored_positions_gives_zero_gradients(N):
    inputs = make_head_inputs(N, 13, 4, ignored=1.0, bias=True, rank=2).as_leaves()
    inputs.call(linear_logprob).sum().backward()
    for tensor in inputs.tensors:
        assert torch.equal(tensor.grad, torch.zeros_like(tensor))


def test_an_empty_slice_with_any_strides_gives_zero_gradients():
    """An empty tensor counts as contiguous, whatever its strides."""
    states = torch.zeros(4, 10).requires_grad_()
    weight = torch.ones(7, 5).requires_grad_()
    labels = torch.zeros(0, dtype=torch.int64)
    linear_logprob(states[:0, ::2], weight, labels).sum().backward()
    assert torch.equal(states.grad, torch.zeros(4, 10))
    assert torch.equal(weight.grad, torch.zeros(7, 5))


def test_one_token_vocabulary_has_zero_gradients():
    inputs = make_head_inputs(6, 1, 4, bias=True).as_leaves()
    stats = inputs.call(linear_logprob_stats)
    stats.token_logps.sum().backward()
    for tensor in inputs.tensors:
        assert torch.equal(tensor.grad, torch.zeros_like(tensor))


@pytest.mark.usefixtures("poison_empty")
@pytest.mark.usefixtures("small_tiles")
def test_uninitialised_memory_is_never_read():
    inputs = make_head_inputs(11, 37, 5, ignored=0.3, bias=True, rank=2)
    actual = gradients(ours, inputs, torch.ones(11, dtype=torch.float64))
    assert all(torch.isfinite(grad).all() for grad in actual)


def test_tied_weights_add_both_gradients():
    ids = torch.tensor([1, 4, 4, 2])
    labels = torch.tensor([4, 4, 2, -100])

    def grad(scorer):
        torch.manual_seed(0)
        embedding = torch.randn(7, 5, dtype=torch.float64, requires_grad=True)
        scorer(torch.tanh(embedding[ids]), embedding).sum().backward()
        return embedding.grad

    def dense(hidden_states, weight):
        log_probs = (hidden_states @ weight.T).log_softmax(-1)
        return log_probs[:3].gather(1, labels[:3, None])

    torch.testing.assert_close(grad(lambda h, w: linear_logprob(h, w, labels)), grad(dense))


def test_non_contiguous_inputs_get_their_gradients():
    inputs = make_head_inputs(8, 13, 6)
    wide = inputs.hidden_states.repeat(1, 2).requires_grad_()
    tall = inputs.lm_head_weight.T.contiguous().requires_grad_()
    shifted = wide.view(2, 4, 12)[:, :-1, ::2]
    labels = inputs.labels.view(2, 4)[:, 1:]
    linear_logprob(shifted, tall.T, labels).sum().backward()
    actual = wide.grad, tall.grad
    wide.grad = tall.grad = None
    dense = (shifted @ tall).log_softmax(-1).gather(-1, labels[..., None])
    dense.sum().backward()
    torch.testing.assert_close(actual, (wide.grad, tall.grad))


def test_minus_infinity_and_nan_do_not_reach_other_rows():
    inputs = make_head_inputs(7, 19, 4, bias=True).as_leaves()
    inputs.options["lm_head_bias"].data[5] = -torch.inf
    inputs.hidden_states.data[3] = torch.nan
    inputs.labels[inputs.labels == 5] = 6
    inputs.call(linear_logprob).sum().backward()
    is_nan = torch.isnan(inputs.hidden_states.grad).any(dim=1)
    assert is_nan.tolist() == [row == 3 for row in range(7)]


@pytest.mark.parametrize("miss", [0.1, 1e-2, 1e-3, 1e-4, 1e-7])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_confident_labels_keep_their_gradient(miss, dtype):
    """The gradient at a label of probability 1 - miss is miss; rounding near 1 would lose it."""
    gap = torch.logit(torch.tensor(1 - miss, dtype=torch.float64))
    hidden_states = torch.tensor([[1.0]], dtype=dtype, requires_grad=True)
    weight = torch.stack([gap, torch.zeros_like(gap)])[:, None].to(dtype).requires_grad_()
    linear_logprob(hidden_states, weight, torch.tensor([0])).backward(torch.ones(1))
    expected = torch.sigmoid(-weight[0, 0].double())
    error = (weight.grad[0, 0].double() - expected).abs() / expected
    assert error <= (0.005 if dtype == torch.bfloat16 else 5e-6)


def test_a_lone_token_has_zero_gradients():
    """Every other token is removed by a bias of -inf: nothing can change, and nothing is NaN."""
    inputs = make_head_inputs(5, 19, 4, bias=True).as_leaves()
    inputs.options["lm_head_bias"].data[:] = -torch.inf
    inputs.options["lm_head_bias"].data[7] = 0.0
    inputs.labels[:] = 7
    token_logps = inputs.call(linear_logprob)
    token_logps.sum().backward()
    assert not token_logps.any()
    assert not any(tensor.grad.any() for tensor in inputs.tensors)


def test_two_backwards_are_equal():
    inputs = make_head_inputs(33, 97, 8, torch.float32, bias=True, rank=2)
    grad = torch.randn(33)
    first, second = gradients(ours, inputs, grad), gradients(ours, inputs, grad)
    assert all(map(torch.equal, first, second))


def test_gradient_accumulates_over_two_backwards():
    inputs = make_head_inputs(5, 11, 3).as_leaves()
    token_logps = inputs.call(linear_logprob)
    token_logps.sum().backward(retain_graph=True)
    once = [tensor.grad.clone() for tensor in inputs.tensors]
    token_logps.sum().backward()
    torch.testing.assert_close([tensor.grad for tensor in inputs.tensors], [2 * g for g in once])


def test_checkpointing_around_the_head_changes_nothing():
    inputs = make_head_inputs(5, 11, 3).as_leaves()
    inputs.call(linear_logprob).sum().backward()
    plain = inputs.hidden_states.grad.clone()
    inputs.hidden_states.grad = None
    torch.utils.checkpoint.checkpoint(
        lambda hidden: linear_logprob(hidden, inputs.lm_head_weight, inputs.labels),
        inputs.hidden_states,
        use_reentrant=False,
    ).sum().backward()
    assert torch.equal(inputs.hidden_states.grad, plain)


def test_no_grad_saves_nothing_for_a_backward():
    inputs = make_head_inputs(5, 11, 3).as_leaves()
    with torch.no_grad():
        assert inputs.call(linear_logprob).grad_fn is None
