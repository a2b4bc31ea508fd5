"""Options of the head in any combination, in bfloat16 on CPUs, against the dense formula.

The dense formula takes the same rounded inputs in float64.
"""

from __future__ import annotations

import os
from dataclasses import replace

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from realign_kernels import Objective, linear_logprob_stats, rdpo_loss
from realign_kernels.objective import reduce_losses
from realign_kernels.testing import (
    HeadInputs,
    dense_log_probs,
    dense_logits,
    make_head_inputs,
    seeded,
)

pytestmark = [pytest.mark.drawn, pytest.mark.usefixtures("each_product_set")]

BF16, F32, F64 = torch.bfloat16, torch.float32, torch.float64
# `make test` asks for 100 in all of test_properties.py; a quarter of that here, for each product.
DRAWN = settings(
    max_examples=max(1, int(os.environ.get("REALIGN_EXAMPLES", "1000")) // 4),
    deadline=None,
    derandomize=True,
    database=None,
)
BUDGETS = st.fixed_dictionaries({"workspace_bytes": st.sampled_from([20_000, 100_000, 1 << 28])})
SLOPES = st.sampled_from([0.0, 1.0, -0.3])


@st.composite
def calls(draw, least_rows=1):
    """Draw a call, some of whose inputs are trained, and the same in float64 and float32."""
    head = make_head_inputs(
        draw(st.sampled_from([least_rows, least_rows + 1, 30, 70])),
        draw(st.sampled_from([2, 3, 31, 64, 203])),
        draw(st.sampled_from([1, 2, 16, 33, 70])),
        seed=draw(st.integers(0, 2**16)),
        bias=draw(st.booleans()),
        rank=draw(st.sampled_from([0, 0, 1, 3])),
        ignored=draw(st.sampled_from([0.0, 0.3])),
        logit_std=draw(st.sampled_from([0.1, 3.0, 12.0])),
        logit_scale=draw(st.sampled_from([1.0, 0.3])),
        logit_softcap=draw(st.sampled_from([None, 5.0])),
        temperature=draw(st.sampled_from([1.0, 0.5])),
    )
    dtypes = draw(st.sampled_from([(BF16, BF16), (BF16, BF16), (BF16, F32), (F32, BF16)]))
    other = draw(st.sampled_from([BF16, F32])) if dtypes[0] == dtypes[1] else F32
    hidden, weight, *others = head.tensors
    inputs = head.replace_tensors(
        [hidden.to(dtypes[0]), weight.to(dtypes[1]), *(part.to(other) for part in others)]
    )
    hidden, weight, *others = inputs.tensors
    rounded = inputs.replace_tensors([hidden, weight.to(hidden.dtype), *others])
    leaves = inputs.as_leaves()
    for tensor in leaves.tensors[1:] if draw(st.booleans()) else ():
        tensor.requires_grad_(False)
    return leaves, rounded.as_leaves(F64), rounded.as_leaves(F32)


def given_logits(exact):
    """Return a call whose hidden states are the logits after all transforms, as a leaf."""
    logits = dense_logits(exact).detach().requires_grad_()
    return HeadInputs(logits, torch.eye(logits.shape[1], dtype=F64), exact.labels, {})


def allowed_errors(exact, logits, *, multiplies_bfloat16):
    """Return, for each gradient, how far the numbers of the head may move it, as a norm.

    A gradient sums over vocabulary or rows.  Its terms may cancel, and their errors do not, so that
    the bound is a part of the sum of absolute values.  Logits of size s, and their distance to the
    label, are off by 2^-22 s, and a probability with its normaliser by twice that.
    """
    options, x = exact.options, logits.detach()
    slope, size = options["logit_scale"] / options["temperature"], 1 + x.abs().max()
    rounding = slope  # The slope of a softcap is off by a rounding of 1, however small it is.
    if options["logit_softcap"] is not None:
        slope = slope * (1 - (x * options["temperature"] / options["logit_softcap"]) ** 2)
    sums = exact.replace_tensors([part.detach().abs().requires_grad_() for part in exact.tensors])
    head = {name: part for name, part in sums.options.items() if name.startswith("lm_head_")}
    dense_logits(replace(sums, options=head)).backward(
        logits.grad.abs() * (slope * size + rounding)
    )
    # Where a token has all of the probability, float64 itself is off by 1e-15 in its logarithm.
    errors = [2**-21 * torch.linalg.norm(part.grad) + 1e-12 for part in sums.tensors]
    if not multiplies_bfloat16:
        return errors
    # Products round exponentials below 1/64 of their row to bfloat16, each by itself, so that their
    # errors add up as roots of sums of squares do.  Entries of label and top token are exact.
    index = torch.where(exact.labels != -100, exact.labels, 0)[:, None]
    terms = torch.where(x.softmax(dim=1) < 1 / 64, logits.grad * slope, 0.0).scatter(1, index, 0.0)
    terms = terms.scatter(1, x.scatter(1, index, -torch.inf).argmax(dim=1, keepdim=True), 0.0)
    parts = [part.detach().square().requires_grad_() for part in exact.tensors[:2]]
    dense_logits(HeadInputs(*parts, exact.labels, {})).backward(terms.square())
    more = [2**-8 * torch.linalg.norm(part.grad.sqrt()) for part in parts]
    return [errors[0] + more[0], errors[1] + more[1], *errors[2:]]


def assert_close_gradients(leaves, exact, dense, logits):
    """The error is not much larger than that of the dense formula in float32 and one rounding."""
    multiplies_bfloat16 = leaves.hidden_states.dtype == leaves.lm_head_weight.dtype == BF16
    bounds = allowed_errors(exact, logits, multiplies_bfloat16=multiplies_bfloat16)
    tensors = zip(leaves.tensors, exact.tensors, dense.tensors, bounds, strict=True)
    for ours, oracle, plain, bound in tensors:
        if not ours.requires_grad:
            continue
        assert ours.grad.dtype == ours.dtype
        base = torch.linalg.norm(plain.grad.to(ours.dtype).double() - oracle.grad)
        error = torch.linalg.norm(ours.grad.double() - oracle.grad)
        rounding = 2**-8 if ours.dtype == BF16 else 0.0
        assert error <= 1.2 * base + rounding * torch.linalg.norm(oracle.grad) + bound


def dense_statistics(inputs):
    """Return log p(label), log p(top), entropy and lse of every row, 0 where it is ignored."""
    log_probs, is_scored = dense_log_probs(inputs), inputs.labels != -100
    index = torch.where(is_scored, inputs.labels, 0)[:, None]
    others = log_probs.scatter(1, index, -torch.inf)
    # Of equals the lowest id, as in the head; amax would share the gradient among them.
    top = (others == others.amax(dim=1, keepdim=True)).int().argmax(dim=1, keepdim=True)
    rows = (
        log_probs.gather(1, index)[:, 0],
        others.gather(1, top)[:, 0],
        -(log_probs.exp() * log_probs).sum(dim=1),
        dense_logits(inputs).logsumexp(dim=1),
    )
    return [torch.where(is_scored, values, 0.0) for values in rows]


@DRAWN
@given(calls(), st.tuples(*[SLOPES] * 4), BUDGETS, st.sampled_from(["auto", "stash", "recompute"]))
def test_statistics_and_gradients_of_combined_options_equal_the_dense_formula(
    drawn, slopes, budgets, memory
):
    leaves, exact, dense = drawn
    stats = leaves.call(linear_logprob_stats, backend="cpu", memory=memory, **budgets)
    ours = [stats.token_logps, stats.top_non_label_logps, stats.entropy, stats.lse]
    expected = dense_statistics(exact)
    size = 1 + dense_logits(exact).abs().amax(dim=1)
    for actual, oracle in zip(ours, expected, strict=True):
        assert ((actual - oracle).abs() <= 2e-6 * size).all()
    # A factor of its own for every row, and slopes of 0 for none.
    factors = torch.randn(len(size), generator=seeded(1), dtype=F64)
    by_logits = given_logits(exact)
    for values in (ours, expected, dense_statistics(dense), dense_statistics(by_logits)):
        parts = [
            (slope * factors.to(part.dtype) * part).sum()
            for slope, part in zip(slopes, values, strict=True)
            if slope != 0
        ]
        torch.stack([0.0 * values[0].sum(), *parts]).sum().backward()
    assert_close_gradients(leaves, exact, dense, by_logits.hidden_states)


def dense_loss(inputs, ids, ref_logps, objective, weights, rejected_scoring):
    """Return loss, sums, and means of entropy and logits; cells by pairs."""
    shape, is_scored = ref_logps.shape, inputs.labels != -100
    labelled, tops, entropy, _ = dense_statistics(inputs)
    scores = labelled
    if rejected_scoring == "top_non_label":
        scores = torch.where(ids >= shape[1], tops, labelled)
    if weights is not None:
        scores = scores * weights.to(scores.dtype)

    def total(values):
        values = torch.where(is_scored, values, 0.0)
        return values.new_zeros(ref_logps.numel()).index_add(0, ids, values).view(shape)

    counts = total(torch.ones_like(scores))
    logps = total(scores)
    loss = reduce_losses(logps, ref_logps.to(logps.dtype), objective, counts.long()).loss
    means = total(entropy), total(dense_logits(inputs).mean(dim=1))
    return loss, logps, *(part / counts.clamp(min=1) for part in means)


@DRAWN
@given(
    calls(least_rows=9),
    BUDGETS,
    st.sampled_from(["auto", "stash", "recompute", "tile", "tile"]),
    st.sampled_from([1 << 30, 8_000]),
    st.integers(1, 3),
    st.sampled_from([Objective.rdpo(), Objective.dpo(), Objective.rdpo(0.5, 0.2, 2.0)]),
    st.sampled_from(["label", "top_non_label"]),
    st.tuples(st.booleans(), st.booleans(), st.booleans()),
)
def test_losses_and_gradients_of_combined_options_equal_the_dense_formula(
    drawn, budgets, memory, stash_bytes, num_pairs, objective, rejected_scoring, flags
):
    is_weighed, statistics, uses_logps = flags
    leaves, exact, dense = drawn
    num_rows = len(leaves.labels)
    ids = (torch.arange(num_rows) % (3 * num_pairs)).flip(0)
    labels = torch.where(ids < num_pairs, leaves.labels.clamp(min=0), leaves.labels)  # present
    leaves, exact, dense = (replace(part, labels=labels) for part in (leaves, exact, dense))
    generator = seeded(2)
    ref_logps = -5 * torch.rand(3, num_pairs, generator=generator)
    weights = torch.rand(num_rows, generator=generator) if is_weighed else None
    upstream = torch.randn(3, num_pairs, generator=generator) / 10 * uses_logps
    if memory in ("auto", "tile"):  # the others refuse a stash that is too large
        budgets = {**budgets, "stash_bytes": stash_bytes}
    output = rdpo_loss(
        leaves.hidden_states, leaves.lm_head_weight, labels, ref_logps, sequence_ids=ids,
        objective=objective, rejected_scoring=rejected_scoring, token_weights=weights,
        statistics=statistics, memory=memory, backend="cpu", **leaves.options, **budgets,
    )  # fmt: skip
    ours = [output.loss, output.logps]
    if statistics:
        ours += [output.entropy, output.mean_logits]
    by_logits = given_logits(exact)
    expected, plain, of_logits = (
        dense_loss(inputs, ids, ref_logps, objective, weights, rejected_scoring)
        for inputs in (exact, dense, by_logits)
    )
    size = 1 + float(dense_logits(exact).detach().abs().max())
    for actual, oracle in zip(ours, expected, strict=False):
        torch.testing.assert_close(actual.double(), oracle, rtol=2e-6, atol=2e-6 * size * num_rows)
    for loss, logps, *_ in (ours, expected, plain, of_logits):
        (loss + (upstream.to(logps.dtype) * logps).sum()).backward()
    assert_close_gradients(leaves, exact, dense, by_logits.hidden_states)
