"""Forward-mode derivatives and transforms of torch.func are refused: they would give zeros."""

from __future__ import annotations

import pytest
import torch
from torch.autograd import forward_ad

from realign_kernels import (
    Objective,
    linear_logprob,
    linear_logprob_stats,
    preference_loss,
    rdpo_loss,
)

pytestmark = [
    pytest.mark.usefixtures("each_backend"),
    # vmap says that it is slow, and make_fx that it keeps a constant
    pytest.mark.filterwarnings("ignore"),
]

V, D, RANK = 11, 4, 2
TANGENT = "must carry no forward-mode tangent, got one. Take the derivative in reverse mode"
TRANSFORM = r"must be outside of the transforms of torch\.func .*, got it inside one"
LABELS = torch.arange(12).reshape(6, 2) % V


def tensors():
    """Every differentiable argument of the head and of a preference batch, by name."""
    return {
        "hidden_states": torch.randn(6, 2, D),
        "lm_head_weight": torch.randn(V, D),
        "lm_head_bias": torch.randn(V),
        "lm_head_lora[0]": torch.randn(RANK, D),
        "lm_head_lora[1]": torch.randn(V, RANK),
        "ref_logps": torch.randn(3, 2),
    }


def call_head(function, given):
    return function(
        given["hidden_states"], given["lm_head_weight"], LABELS, lm_head_bias=given["lm_head_bias"],
        lm_head_lora=(given["lm_head_lora[0]"], given["lm_head_lora[1]"], 0.5),
    )  # fmt: skip


def call_loss(given, memory="auto"):
    return rdpo_loss(
        given["hidden_states"], given["lm_head_weight"], LABELS, given["ref_logps"], memory=memory,
        lm_head_bias=given["lm_head_bias"],
        lm_head_lora=(given["lm_head_lora[0]"], given["lm_head_lora[1]"], 0.5),
    ).loss  # fmt: skip


FUNCTIONS = {
    "linear_logprob": lambda given: call_head(linear_logprob, given).sum(),
    "linear_logprob_stats": lambda given: call_head(linear_logprob_stats, given)[0].sum(),
    "rdpo_loss": call_loss,
    "rdpo_loss of tiles": lambda given: call_loss(given, memory="tile"),
}


def with_one(function, name):
    """Return a function of one tensor, and its value."""
    given = tensors()
    return lambda tensor: FUNCTIONS[function]({**given, name: tensor}), given[name]


ARGUMENTS = [
    (function, name)
    for function in FUNCTIONS
    for name in tensors()
    if name != "ref_logps" or function.startswith("rdpo_loss")
]


@pytest.mark.parametrize("trains", [False, True])
@pytest.mark.parametrize(("function", "name"), ARGUMENTS)
def test_a_tangent_is_refused(function, name, trains):
    of_one, value = with_one(function, name)
    with forward_ad.dual_level(), pytest.raises(NotImplementedError) as raised:
        of_one(forward_ad.make_dual(value.requires_grad_(trains), torch.ones_like(value)))
    assert str(raised.value).startswith(f"{name} {TANGENT}")


TRANSFORMS = {
    "jvp": lambda f, x: torch.func.jvp(f, (x,), (torch.ones_like(x),)),
    "jacfwd": lambda f, x: torch.func.jacfwd(f)(x),
    "linearize": lambda f, x: torch.func.linearize(f, x)[1](x),
    "grad": lambda f, x: torch.func.grad(f)(x),
    "grad_and_value": lambda f, x: torch.func.grad_and_value(f)(x),
    "vjp": lambda f, x: torch.func.vjp(f, x),
    "jacrev": lambda f, x: torch.func.jacrev(f)(x),
    "hessian": lambda f, x: torch.func.hessian(f)(x),
    "vmap": lambda f, x: torch.func.vmap(f)(torch.stack([x, x])),
    "grad of a compiled function": lambda f, x: torch.func.grad(
        torch.compile(f, backend="aot_eager")
    )(x),
    "a compiled gradient": lambda f, x: torch.compile(torch.func.grad(f), backend="aot_eager")(x),
    "a compiled jvp": lambda f, x: torch.compile(
        lambda y: torch.func.jvp(f, (y,), (torch.ones_like(y),)), backend="aot_eager"
    )(x),
}


@pytest.mark.parametrize("transform", TRANSFORMS)
@pytest.mark.parametrize("function", FUNCTIONS)
def test_transforms_of_torch_func_are_refused(function, transform):
    torch._dynamo.reset()
    of_one, value = with_one(function, "hidden_states")
    with pytest.raises(NotImplementedError, match=f"{TANGENT}|{TRANSFORM}"):
        TRANSFORMS[transform](of_one, value)


def test_every_argument_is_checked_for_transforms():
    for function, name in ARGUMENTS:
        of_one, value = with_one(function, name)
        for transform in ("grad", "vmap"):
            with pytest.raises(NotImplementedError, match=TRANSFORM) as raised:
                TRANSFORMS[transform](of_one, value)
            assert str(raised.value).startswith(name)


def test_a_parameter_captured_by_a_transformed_function_is_refused():
    """The transformed function closes over the parameter."""
    weight = torch.randn(V, D, requires_grad=True)
    hidden_states = torch.randn(6, 2, D)

    def score(x):
        return x.sum() + linear_logprob(hidden_states, weight, LABELS).sum()

    with pytest.raises(NotImplementedError, match=f"lm_head_weight {TRANSFORM}"):
        torch.func.grad(score)(torch.ones(2))


def test_constants_of_a_transformed_function_are_computed():
    hidden_states, weight = torch.randn(6, 2, D), torch.randn(V, D)

    def scaled(x):
        return x * linear_logprob(hidden_states, weight, LABELS).sum()

    expected = linear_logprob(hidden_states, weight, LABELS).sum()
    assert torch.equal(torch.func.grad(scaled)(torch.tensor(1.0)), expected)
    with forward_ad.dual_level():
        result = scaled(forward_ad.make_dual(torch.tensor(1.0), torch.tensor(2.0)))
        assert torch.equal(forward_ad.unpack_dual(result).tangent, 2 * expected)


@pytest.mark.parametrize("memory", ["auto", "stash", "recompute", "tile"])
def test_a_tangent_of_an_outer_level_is_refused(memory):
    given = tensors()
    given["hidden_states"].requires_grad_()
    if memory != "auto":
        given["lm_head_weight"].requires_grad_()
    with forward_ad.dual_level():
        loss = call_loss(given, memory) * forward_ad.make_dual(torch.ones(()), torch.ones(()))
        with pytest.raises(NotImplementedError, match=f"the upstream gradient {TANGENT}"):
            torch.autograd.grad(loss, given["hidden_states"])
        logps = call_head(linear_logprob, given)
        upstream = forward_ad.make_dual(torch.ones(6, 2), torch.ones(6, 2))
        with pytest.raises(NotImplementedError, match=f"the upstream gradient {TANGENT}"):
            torch.autograd.grad(logps, given["hidden_states"], upstream)


def test_reverse_mode_works_through_a_module_with_other_parameters():
    class Head(torch.nn.Module):
        def __init__(self):
            super().__init__()
            self.weight = torch.nn.Parameter(torch.randn(V, D))

        def forward(self, hidden_states):
            return linear_logprob(hidden_states, self.weight, LABELS).sum()

    weight, hidden_states = torch.randn(V, D, requires_grad=True), torch.randn(6, 2, D)
    scores = torch.func.functional_call(Head(), {"weight": weight}, (hidden_states,))
    (grad,) = torch.autograd.grad(scores, weight)
    (expected,) = torch.autograd.grad(linear_logprob(hidden_states, weight, LABELS).sum(), weight)
    assert torch.equal(grad, expected)


def test_a_jacobian_in_reverse_mode_equals_the_dense_one():
    hidden_states, weight = torch.randn(3, D).double(), torch.randn(V, D).double()
    labels = torch.arange(3)

    def dense(x):
        return (x @ weight.T).log_softmax(dim=-1).gather(-1, labels[:, None])[:, 0]

    jacobian = torch.autograd.functional.jacobian
    expected = jacobian(dense, hidden_states)
    for vectorize in (False, True):
        actual = jacobian(
            lambda x: linear_logprob(x, weight, labels), hidden_states, vectorize=vectorize
        )
        torch.testing.assert_close(actual, expected)


def test_preference_loss_has_forward_derivatives_only_in_logps():
    """The loss is plain torch; a reference is a constant, whose tangent would be lost."""
    logps, ref_logps = torch.randn(3, 2).double(), torch.randn(3, 2).double()

    def loss(x):
        return preference_loss(x, ref_logps, Objective.rdpo()).loss

    tangent = torch.randn(3, 2).double()
    forward = torch.func.jvp(loss, (logps,), (tangent,))[1]
    gradient = torch.func.grad(loss)(logps)
    torch.testing.assert_close(forward, (gradient * tangent).sum())
    with forward_ad.dual_level(), pytest.raises(NotImplementedError, match=f"ref_logps {TANGENT}"):
        preference_loss(logps, forward_ad.make_dual(ref_logps, tangent), Objective.rdpo())
