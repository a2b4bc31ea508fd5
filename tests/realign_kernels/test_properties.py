"""Relations that hold for every input: permutations, padding, shifts and swaps."""

from __future__ import annotations

import os

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from realign_kernels import Objective, linear_logprob, linear_logprob_stats, rdpo_loss
from realign_kernels.testing import HeadInputs, dense_logprob, make_head_inputs, seeded

pytestmark = pytest.mark.usefixtures("each_backend")

PROPERTY = settings(
    max_examples=40,
    deadline=None,
    derandomize=True,
    database=None,
)
# `make test` asks for 50, `make test-slow` for 5,000.
EXAMPLES = int(os.environ.get("REALIGN_EXAMPLES", "1000"))
LARGEST_WORKSPACE = 1 << 20


@st.composite
def calls(draw):
    """Draw a call: any small shape, head, transform and share of ignored rows."""
    return make_head_inputs(
        draw(st.integers(0, 12)),
        draw(st.integers(1, 40)),
        draw(st.integers(1, 6)),
        seed=draw(st.integers(0, 2**16)),
        bias=draw(st.booleans()),
        rank=draw(st.integers(0, 2)),
        ignored=draw(st.sampled_from([0.0, 0.3, 1.0])),
        logit_std=draw(st.sampled_from([0.1, 3.0, 30.0])),
        logit_scale=draw(st.sampled_from([1.0, 0.3])),
        logit_softcap=draw(st.sampled_from([None, 5.0])),
        temperature=draw(st.sampled_from([1.0, 2.0])),
    )


def permutation(size, seed):
    return torch.randperm(size, generator=seeded(seed))


@pytest.mark.drawn
@settings(PROPERTY, max_examples=EXAMPLES)
@given(calls(), st.integers(1_000, LARGEST_WORKSPACE))
def test_value_and_gradients_are_those_of_the_dense_formula(inputs, workspace_bytes):
    ours, dense = inputs.as_leaves(), inputs.as_leaves()
    actual = ours.call(linear_logprob, workspace_bytes=workspace_bytes)
    expected = dense_logprob(dense)
    torch.testing.assert_close(actual, expected, rtol=1e-9, atol=1e-9)
    weights = torch.linspace(-1, 2, len(actual), dtype=torch.float64)
    (actual @ weights).backward()
    (expected @ weights).backward()
    for tensor, oracle in zip(ours.tensors, dense.tensors, strict=True):
        torch.testing.assert_close(tensor.grad, oracle.grad, rtol=1e-8, atol=1e-8)


@PROPERTY
@given(calls(), st.integers(0, 99))
def test_permuting_rows_permutes_results(inputs, seed):
    order = permutation(len(inputs.labels), seed)
    stats = inputs.call(linear_logprob_stats)
    permuted = linear_logprob_stats(
        inputs.hidden_states[order],
        inputs.lm_head_weight,
        inputs.labels[order],
        **inputs.options,
    )
    torch.testing.assert_close(permuted, type(stats)(*(part[order] for part in stats)))


def permute_vocabulary(inputs, order):
    """Return the same call under other names of the tokens."""
    options = dict(inputs.options)
    if "lm_head_bias" in options:
        options["lm_head_bias"] = options["lm_head_bias"][order]
    if "lm_head_lora" in options:
        lora_a, lora_b, scaling = options["lm_head_lora"]
        options["lm_head_lora"] = (lora_a, lora_b[order], scaling)
    is_scored = inputs.labels != -100
    labels = torch.where(is_scored, torch.argsort(order)[inputs.labels.clamp(min=0)], -100)
    return HeadInputs(inputs.hidden_states, inputs.lm_head_weight[order], labels, options)


@PROPERTY
@given(calls(), st.integers(0, 99))
def test_permuting_the_vocabulary_changes_nothing(inputs, seed):
    order = permutation(len(inputs.lm_head_weight), seed)
    permuted, plain = (
        call.call(linear_logprob_stats) for call in (permute_vocabulary(inputs, order), inputs)
    )
    for name in ("token_logps", "entropy", "log_sum_sq_probs", "top_non_label_logps"):
        torch.testing.assert_close(
            getattr(permuted, name), getattr(plain, name), rtol=1e-9, atol=1e-9
        )
    has_top = plain.top_non_label_ids >= 0
    actual = order[permuted.top_non_label_ids[has_top]]
    assert torch.equal(actual, plain.top_non_label_ids[has_top])


@PROPERTY
@given(calls(), st.floats(-50, 50))
def test_a_constant_on_every_logit_changes_nothing(inputs, constant):
    inputs.options["logit_softcap"] = None  # the cap is not blind to a constant
    expected = inputs.call(linear_logprob)
    bias = inputs.options.get("lm_head_bias", torch.zeros(1, dtype=torch.float64))
    inputs.options["lm_head_bias"] = (bias + constant).expand(len(inputs.lm_head_weight))
    torch.testing.assert_close(inputs.call(linear_logprob), expected, rtol=1e-9, atol=1e-9)


@PROPERTY
@given(calls(), st.integers(0, 5))
def test_padding_rows_changes_nothing(inputs, num_padding):
    width = inputs.hidden_states.shape[1]
    rows = torch.full((num_padding, width), 1e30, dtype=torch.float64)
    ignored = inputs.labels.new_full((num_padding,), -100)
    padded = HeadInputs(
        torch.cat([rows, inputs.hidden_states, rows]),
        inputs.lm_head_weight,
        torch.cat([ignored, inputs.labels, ignored]),
        inputs.options,
    )
    actual = padded.call(linear_logprob)[num_padding : num_padding + len(inputs.labels)]
    torch.testing.assert_close(actual, inputs.call(linear_logprob))


@PROPERTY
@given(calls())
def test_statistics_satisfy_their_inequalities(inputs):
    stats = inputs.call(linear_logprob_stats)
    is_scored = inputs.labels != -100
    V = len(inputs.lm_head_weight)
    log_v = torch.log(torch.tensor(float(V), dtype=torch.float64))
    assert (stats.token_logps <= 0).all()
    assert (stats.top_non_label_logps <= 0).all()
    assert (stats.entropy >= 0).all()
    assert (stats.entropy <= log_v + 1e-9).all()
    assert (stats.log_sum_sq_probs[is_scored] >= -log_v - 1e-9).all()
    assert torch.equal(stats.is_top1, is_scored & (stats.token_logps >= stats.top_non_label_logps))
    assert (stats.top_non_label_ids[is_scored] != inputs.labels[is_scored]).all()


@st.composite
def batches(draw):
    """Draw a padded batch of pairs with answers of any length from one."""
    num_cells, num_pairs = draw(st.integers(3, 4)), draw(st.integers(1, 3))
    length = draw(st.integers(1, 4))
    num_sequences = num_cells * num_pairs
    inputs = make_head_inputs(num_sequences * length, 13, 3, seed=draw(st.integers(0, 2**16)))
    labels = inputs.labels.view(num_sequences, length)
    for sequence in range(num_sequences):
        labels[sequence, draw(st.integers(1, length)) :] = -100
    ref_logps = draw(st.lists(st.floats(-40, 0), min_size=num_sequences, max_size=num_sequences))
    ref_logps = torch.tensor(ref_logps, dtype=torch.float64).view(num_cells, num_pairs)
    hidden_states = inputs.hidden_states.view(num_sequences, length, 3)
    return hidden_states, inputs.lm_head_weight, labels, ref_logps


@PROPERTY
@given(batches())
def test_swapping_the_answers_flips_the_text_margin(batch):
    hidden_states, weight, labels, ref_logps = batch
    swap = [1, 0, *range(2, len(ref_logps))]
    by_cell = [
        part.unflatten(0, ref_logps.shape)[swap].flatten(0, 1) for part in (hidden_states, labels)
    ]
    output = rdpo_loss(hidden_states, weight, labels, ref_logps, objective=Objective.dpo())
    swapped = rdpo_loss(by_cell[0], weight, by_cell[1], ref_logps[swap], objective=Objective.dpo())
    torch.testing.assert_close(swapped.text_margins, -output.text_margins)


@PROPERTY
@given(batches(), st.integers(0, 3), st.integers(0, 99))
def test_padding_and_order_of_pairs_change_nothing(batch, num_padding, seed):
    hidden_states, weight, labels, ref_logps = batch
    order = permutation(ref_logps.shape[1], seed)
    hidden_states_padded = torch.nn.functional.pad(hidden_states, (0, 0, num_padding, 1), value=9.0)
    labels_padded = torch.nn.functional.pad(labels, (num_padding, 1), value=-100)
    permuted = [
        part.unflatten(0, ref_logps.shape)[:, order].flatten(0, 1)
        for part in (hidden_states_padded, labels_padded)
    ]
    expected = rdpo_loss(hidden_states, weight, labels, ref_logps)
    actual = rdpo_loss(permuted[0], weight, permuted[1], ref_logps[:, order])
    torch.testing.assert_close(actual.loss, expected.loss)
    torch.testing.assert_close(actual.logps, expected.logps[:, order])
    torch.testing.assert_close(actual.image_margins, expected.image_margins[order])


@PROPERTY
@given(batches())
def test_packed_equals_padded(batch):
    hidden_states, weight, labels, ref_logps = batch
    is_scored = labels != -100
    sequence_ids = torch.arange(len(labels))[:, None].expand_as(labels)[is_scored]
    expected = rdpo_loss(hidden_states, weight, labels, ref_logps)
    actual = rdpo_loss(
        hidden_states[is_scored], weight, labels[is_scored], ref_logps, sequence_ids=sequence_ids
    )
    torch.testing.assert_close(actual, expected)


@PROPERTY
@given(batches(), st.floats(0.01, 5.0))
def test_rewards_scale_with_beta(batch, beta):
    one = rdpo_loss(*batch, beta=1.0)
    scaled = rdpo_loss(*batch, beta=beta)
    torch.testing.assert_close(scaled.rewards, beta * one.rewards)
    torch.testing.assert_close(scaled.image_margins, beta * one.image_margins)
