"""None where other heads take None, and the number of scored labels from the host."""

from __future__ import annotations

import pytest
import torch

from realign_kernels import linear_logprob, linear_logprob_stats, rdpo_loss
from realign_kernels.testing import make_head_inputs

pytestmark = pytest.mark.usefixtures("each_backend")

BOTH = pytest.mark.parametrize("function", [linear_logprob, linear_logprob_stats])


@BOTH
def test_a_logit_scale_of_none_equals_one(function):
    inputs = make_head_inputs(7, 11, 4)
    actual = inputs.call(function, logit_scale=None)
    torch.testing.assert_close(actual, inputs.call(function), rtol=0, atol=0)


@BOTH
def test_an_ignore_index_of_none_scores_every_label(function):
    inputs = make_head_inputs(7, 11, 4)
    actual = inputs.call(function, ignore_index=None)
    torch.testing.assert_close(actual, inputs.call(function), rtol=0, atol=0)
    for label in (-100, -(2**63), 11):
        inputs.labels[3] = label
        message = rf"labels must be in \[0, V\), got {label} at index \(3,\)"
        with pytest.raises(ValueError, match=message):
            inputs.call(function, ignore_index=None)


def test_the_loss_accepts_none_for_default_arguments():
    hidden, weight = torch.randn(6, 2, 4), torch.randn(11, 4)
    labels, ref_logps = torch.arange(12).reshape(6, 2) % 11, torch.zeros(3, 2)
    expected = rdpo_loss(hidden, weight, labels, ref_logps)
    actual = rdpo_loss(hidden, weight, labels, ref_logps, ignore_index=None, logit_scale=None)
    torch.testing.assert_close(actual, expected, rtol=0, atol=0)


@BOTH
def test_num_scored_does_not_change_the_result(function):
    inputs = make_head_inputs(9, 11, 4, ignored=0.4)
    num_scored = int((inputs.labels != -100).sum())
    expected = inputs.call(function)
    actual = inputs.call(function, num_scored=num_scored)
    torch.testing.assert_close(actual, expected, rtol=0, atol=0)
    for wrong in (num_scored - 1, num_scored + 1):
        message = f"num_scored must be .* not ignored, {num_scored}, got {wrong}. Count them on"
        with pytest.raises(ValueError, match=message):
            inputs.call(function, num_scored=wrong)
    with pytest.raises(ValueError, match="num_scored must be >= 0, got -1"):
        inputs.call(function, num_scored=-1)


def test_a_given_num_scored_is_not_counted_on_the_device(monkeypatch):
    """A GPU finds positions without waiting for their number."""
    inputs = make_head_inputs(9, 11, 4, ignored=0.4)
    num_scored = int((inputs.labels != -100).sum())
    expected = inputs.call(linear_logprob)

    def known(lengths, device, waits):
        return int(lengths.sum())

    monkeypatch.setattr("realign_kernels.ops.score_tokens.known_number", known)
    monkeypatch.setattr(torch, "nonzero", None)
    assert torch.equal(inputs.call(linear_logprob, num_scored=num_scored), expected)


def test_any_num_scored_compiles_into_one_graph():
    torch._dynamo.reset()
    weight = torch.randn(11, 4)
    compiled = torch.compile(
        lambda hidden, labels, num_scored: linear_logprob(
            hidden, weight, labels, num_scored=num_scored
        ),
        fullgraph=True,
        backend="aot_eager",
    )
    for number in (3, 5, 7):
        hidden, labels = torch.randn(9, 4), torch.full((9,), -100)
        labels[:number] = 2
        expected = linear_logprob(hidden, weight, labels)
        assert torch.equal(compiled(hidden, labels, number), expected)


def test_changing_temperature_beta_and_scaling_compile_into_one_graph():
    """A schedule of temperatures or betas is traced symbolically from its second value."""
    torch._dynamo.reset()
    hidden, weight = torch.randn(6, 2, 4), torch.randn(11, 4)
    factors = torch.randn(2, 4), torch.randn(11, 2)
    labels, ref_logps = torch.arange(12).reshape(6, 2) % 11, torch.zeros(3, 2)

    def loss(temperature, beta, scaling):
        return rdpo_loss(
            hidden, weight, labels, ref_logps, temperature=temperature, beta=beta,
            logit_softcap=2.0 * temperature, lm_head_lora=(*factors, scaling),
        ).loss  # fmt: skip

    compiled = torch.compile(loss, fullgraph=True, backend="aot_eager")
    for numbers in ((1.0, 0.1, 0.5), (1.5, 0.2, 0.6), (2.25, 0.4, 0.7)):
        assert torch.equal(compiled(*numbers), loss(*numbers))


def test_dynamic_shapes_compile_into_one_graph():
    """The numbers of an objective are symbolic as well with ``dynamic=True``."""

    def loss(hidden, weight, labels):
        ids = torch.arange(len(labels)) % 6
        return rdpo_loss(hidden, weight, labels, torch.zeros(3, 2), sequence_ids=ids).loss

    torch._dynamo.reset()
    compiled = torch.compile(loss, fullgraph=True, backend="aot_eager", dynamic=True)
    for num_rows, vocabulary in ((12, 31), (18, 40)):
        inputs = make_head_inputs(num_rows, vocabulary, 5).as_leaves()
        actual, expected = (
            torch.autograd.grad(function(*inputs.tensors, inputs.labels), inputs.tensors)
            for function in (compiled, loss)
        )
        for grad, oracle in zip(actual, expected, strict=True):
            assert torch.equal(grad, oracle)
