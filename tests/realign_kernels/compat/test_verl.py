"""verl's function and module against float64 on the same rounded inputs.

Run as a script, this file is one of the two processes of a tensor-parallel group.
"""

from __future__ import annotations

import sys

import pytest
import torch
import torch.distributed as dist

from realign_kernels import linear_logprob_stats
from realign_kernels.compat.verl import FusedLinearForPPO, linear_cross_entropy
from realign_kernels.testing import seeded

# dtype to what log-probabilities and gradients may be off by, the latter relative
BOUNDS = {torch.float32: (1e-5, 1e-6), torch.bfloat16: (1e-4, 2.5e-3)}
N, V, D = 24, 61, 16


def make_inputs(dtype=torch.float64):
    generator = seeded(0)
    hidden = torch.randn(N, D, generator=generator, dtype=torch.float64)
    weight = torch.randn(V, D, generator=generator, dtype=torch.float64) * 3 / D**0.5
    labels = torch.randint(0, V, (N,), generator=generator)
    return hidden.to(dtype), weight.to(dtype), labels


def as_leaves(*tensors, dtype=None):
    return [
        tensor.detach().to(dtype or tensor.dtype, copy=True).requires_grad_() for tensor in tensors
    ]


def dense(hidden, weight, labels, temperature):
    log_probs = (hidden @ weight.T / temperature).log_softmax(dim=1)
    entropy = -(log_probs.exp() * log_probs).sum(dim=1)
    return log_probs.gather(1, labels[:, None]).squeeze(1), entropy


def check_gradients(leaves, exact, bound):
    for tensor, oracle in zip(leaves, exact, strict=True):
        assert tensor.grad.dtype == tensor.dtype
        assert (tensor.grad - oracle.grad).norm() <= bound * oracle.grad.norm()


@pytest.mark.parametrize("dtype", BOUNDS, ids=str)
@pytest.mark.parametrize("temperature", [1.0, 0.7])
@pytest.mark.parametrize("reduction", ["none", "sum", "mean", "Mean"])
@pytest.mark.usefixtures("each_backend")
def test_values_and_gradients_equal_float64(reduction, temperature, dtype):
    hidden, weight, labels = make_inputs(dtype)
    leaves = as_leaves(hidden, weight)
    exact = as_leaves(hidden, weight, dtype=torch.float64)
    logprobs, entropy = linear_cross_entropy(*leaves, labels, temperature, reduction)
    expected, expected_entropy = dense(*exact, labels, temperature)
    if reduction != "none":
        expected = expected.sum() / (1 if reduction == "sum" else N)
    assert logprobs.dtype == entropy.dtype == torch.float32
    assert (logprobs.shape, entropy.shape) == (expected.shape, (N,))
    bound, bound_of_gradients = BOUNDS[dtype]
    assert (logprobs - expected).abs().max() <= bound * (N if reduction == "sum" else 1)
    assert (entropy - expected_entropy).abs().max() <= bound
    slopes = torch.linspace(-1, 2, N, dtype=torch.float64)
    for values, entropies in ((logprobs, entropy), (expected, expected_entropy)):
        weights = slopes if reduction == "none" else slopes[:1]
        ((weights * values).sum() + (slopes.flip(0) * entropies).sum()).backward()
    check_gradients(leaves, exact, bound_of_gradients)


@pytest.mark.parametrize("used", [0, 1], ids=["logprobs", "entropy"])
def test_each_result_has_its_gradient(used):
    hidden, weight, labels = make_inputs()
    leaves, exact = as_leaves(hidden, weight), as_leaves(hidden, weight)
    linear_cross_entropy(*leaves, labels, 1.3)[used].sum().backward()
    dense(*exact, labels, 1.3)[used].sum().backward()
    check_gradients(leaves, exact, 1e-12)


@pytest.mark.parametrize(
    ("of_hidden", "of_labels"),
    [((4, 6), (4, 6)), ((N, 1), (1, N)), ((4, 6), (N,)), ((N,), (4, 6)), ((4, 1, 6), (4, 6))],
    ids=str,
)
def test_shapes_are_flattened(of_hidden, of_labels):
    hidden, weight, labels = make_inputs()
    expected = linear_cross_entropy(hidden, weight, labels)
    actual = linear_cross_entropy(
        hidden.view(*of_hidden, D), weight, labels.view(of_labels).to(torch.int32)
    )
    torch.testing.assert_close(actual, expected, rtol=0, atol=0)


@pytest.mark.parametrize("dtype", BOUNDS, ids=str)
@pytest.mark.usefixtures("each_backend")
def test_the_module_keeps_the_shape(dtype):
    hidden, weight, labels = make_inputs(dtype)
    leaves = as_leaves(hidden.view(4, 6, D), weight)
    exact = as_leaves(hidden.view(4, 6, D), weight, dtype=torch.float64)
    module = FusedLinearForPPO(chunk_size=5, impl_backend="liger")
    log_probs, entropy = module(
        hidden_states=leaves[0],
        vocab_weights=leaves[1],
        input_ids=labels.view(4, 6).to(torch.int32),
        temperature=0.8,
    )
    expected = dense(exact[0].view(N, D), exact[1], labels, 0.8)
    bound, bound_of_gradients = BOUNDS[dtype]
    for values, oracle in zip((log_probs, entropy), expected, strict=True):
        assert (values.shape, values.dtype) == ((4, 6), torch.float32)
        assert (values - oracle.view(4, 6)).abs().max() <= bound
    (log_probs.sum() - 0.3 * entropy.square().sum()).backward()
    (expected[0].sum() - 0.3 * expected[1].square().sum()).backward()
    check_gradients(leaves, exact, bound_of_gradients)


@pytest.mark.parametrize("label", [-100, V])
def test_negative_labels_are_refused_and_not_ignored(label):
    hidden, weight, labels = make_inputs()
    labels[3] = label
    rule = rf"must be in \[0, V\), got {label} at index \(3,\)"
    with pytest.raises(ValueError, match=f"labels {rule}"):
        linear_cross_entropy(hidden, weight, labels)
    with pytest.raises(ValueError, match=f"input_ids {rule}"):
        FusedLinearForPPO()(hidden, weight, labels)


REFUSED = {
    "another reduction": (
        {"reduction": "batchmean"},
        ValueError,
        r"reduction must be one of \['none', 'sum', 'mean'\], got 'batchmean'. Leave it out",
    ),
    "no reduction": ({"reduction": None}, TypeError, "reduction must be a string, got NoneType."),
    "a temperature a token": (
        {"temperature": torch.ones(N)},
        TypeError,
        r"temperature must be a number, got Tensor of shape \(24,\). .* pass its .item\(\)",
    ),
    "no temperature": (
        {"temperature": 0.0},
        ValueError,
        r"temperature must be finite and > 0, got 0.0",
    ),
    "no labels": ({"labels": [1, 2]}, TypeError, r"labels must be a torch.Tensor, got list"),
    "no hidden states": ({"hidden": None}, TypeError, "hidden must be a torch.Tensor, got None"),
    "floating labels": (
        {"labels": torch.zeros(N)},
        TypeError,
        r"labels must be torch.int64, got torch.float32. Call .long\(\)",
    ),
    "another order": (
        {"hidden": torch.zeros(6, 4, D), "labels": torch.zeros(4, 6, dtype=torch.int64)},
        ValueError,
        r"labels must have shape \(6, 4\) to match hidden, got \(4, 6\). .* transpose one of them",
    ),
    "fewer labels": (
        {"labels": torch.zeros(N - 1, dtype=torch.int64)},
        ValueError,
        r"labels must have shape \(24,\) to match hidden, got \(23,\)",
    ),
    "a group without its processes": (
        {"dist_process_group": object()},
        RuntimeError,
        r"^dist_process_group must belong to an initialised .*, or pass dist_process_group=None",
    ),
    "a number as group": (
        {"dist_process_group": 0},
        TypeError,
        r"dist_process_group must be a torch.distributed.ProcessGroup or None, got int",
    ),
}


@pytest.mark.parametrize(("change", "error", "message"), REFUSED.values(), ids=REFUSED)
def test_invalid_arguments_are_refused(change, error, message):
    hidden, weight, labels = make_inputs(torch.float32)
    arguments = {"hidden": hidden, "weight": weight, "labels": labels} | change
    with pytest.raises(error, match=message):
        linear_cross_entropy(**arguments)


def test_invalid_module_arguments_are_refused():
    hidden, weight, labels = make_inputs()
    with pytest.raises(TypeError, match=r"input_ids must be a torch.Tensor, got list"):
        FusedLinearForPPO()(hidden, weight, labels.tolist())
    with pytest.raises(TypeError, match=r"input_ids must be torch.int64, got torch.bool"):
        FusedLinearForPPO()(hidden, weight, labels > 3)


def test_every_length_compiles_into_one_graph():
    torch._dynamo.reset()
    weight = make_inputs()[1].requires_grad_()
    for function in (FusedLinearForPPO(), linear_cross_entropy):
        compiled = torch.compile(function, fullgraph=True, backend="aot_eager", dynamic=True)
        for length in (5, 9):
            hidden, labels = torch.randn(2, length, D).double(), torch.arange(2 * length) % V
            leaves = [hidden.requires_grad_(), weight]
            actual, expected = (
                torch.autograd.grad(
                    sum(part.sum() for part in call(*leaves, labels.view(2, length), 0.7)), leaves
                )
                for call in (compiled, function)
            )
            torch.testing.assert_close(actual, expected, rtol=0, atol=0)


def check_rank(rank):
    """Everything is that of the whole vocabulary; gradients of hidden states add up to it."""
    hidden, weight, labels = make_inputs()
    whole, exact = slice(0, 31) if rank == 0 else slice(31, V), as_leaves(hidden, weight)
    leaves = as_leaves(hidden, weight[whole])
    actual = linear_cross_entropy(
        leaves[0].view(N, 1, D), leaves[1], labels.view(1, N), 0.7, "none", dist.group.WORLD
    )
    expected = linear_logprob_stats(*exact, labels, temperature=0.7)
    torch.testing.assert_close(actual, (expected.token_logps, expected.entropy))
    (actual[0].sum() - 0.2 * actual[1].square().sum()).backward()
    (expected.token_logps.sum() - 0.2 * expected.entropy.square().sum()).backward()
    torch.testing.assert_close(leaves[1].grad, exact[1].grad[whole])
    dist.all_reduce(leaves[0].grad)
    torch.testing.assert_close(leaves[0].grad, exact[0].grad)
    with torch.no_grad():
        again = linear_cross_entropy(*leaves, labels, 0.7, "mean", dist.group.WORLD)
    torch.testing.assert_close(again, (expected.token_logps.mean(), expected.entropy))


def main(rank, rendezvous):
    torch.set_num_threads(1)
    dist.init_process_group("gloo", init_method=f"file://{rendezvous}", rank=rank, world_size=2)
    check_rank(rank)
    dist.barrier()  # a rank whose partner is gone while it still sends is aborted
    dist.destroy_process_group()


def test_two_ranks_that_share_the_vocabulary_equal_one(run_two_ranks):
    run_two_ranks(__file__)


if __name__ == "__main__":
    main(int(sys.argv[1]), sys.argv[2])
