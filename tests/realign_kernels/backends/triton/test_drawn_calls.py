"""K29: the property of ../test_properties.py on the Triton kernels, with fewer examples."""

from __future__ import annotations

import os

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from realign_kernels import linear_logprob
from realign_kernels.testing import dense_logprob, make_head_inputs

# 10 in `make test`, 50 in `make test-full`, 250 in `make test-slow`: the interpreter is slow.
EXAMPLES = max(10, int(os.environ.get("REALIGN_EXAMPLES", "1000")) // 20)


@pytest.mark.drawn
@pytest.mark.usefixtures("few_rows")
@settings(
    max_examples=EXAMPLES,
    deadline=None,
    derandomize=True,
    database=None,
    suppress_health_check=[HealthCheck.function_scoped_fixture],  # one for all examples
)
@given(
    shape=st.tuples(st.integers(0, 3), st.integers(1, 11), st.integers(1, 5)),
    seed=st.integers(0, 2**16),
    head=st.fixed_dictionaries(
        {
            "bias": st.booleans(),
            "rank": st.integers(0, 2),
            "ignored": st.sampled_from([0.0, 0.3, 1.0]),
            "logit_std": st.sampled_from([0.1, 3.0, 30.0]),
            "logit_softcap": st.sampled_from([None, 5.0]),
            "temperature": st.sampled_from([1.0, 2.0]),
        }
    ),
    memory=st.sampled_from(["auto", "stash", "recompute"]),
    trains_head=st.booleans(),
)
def test_value_and_gradients_are_those_of_the_dense_formula(shape, seed, head, memory, trains_head):
    inputs = make_head_inputs(*shape, torch.float32, seed=seed, **head)
    ours, dense = inputs.as_leaves(), inputs.as_leaves(torch.float64)
    for tensor in () if trains_head else ours.tensors[1:]:
        tensor.requires_grad_(False)
    actual, expected = (
        ours.call(linear_logprob, backend="triton", memory=memory),
        dense_logprob(dense),
    )
    torch.testing.assert_close(actual.double(), expected, rtol=2e-5, atol=2e-5)
    weights = torch.linspace(-1, 2, len(actual))
    (actual @ weights).backward()
    (expected @ weights.double()).backward()
    for tensor, oracle in zip(ours.tensors, dense.tensors, strict=True):
        if tensor.requires_grad:
            scale = 1 + oracle.grad.abs().max() if oracle.grad.numel() else 1
            assert ((tensor.grad - oracle.grad).abs() <= 5e-5 * scale).all()
