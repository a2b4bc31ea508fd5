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
from realign_kernels.testing import dense_log_probs, dense_logits, make_head_inputs, seeded

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


def assert_close_gradients(leaves, exact, dense):
    """Not much farther from float64 than the dense formula in float32 and one rounding."""
    for ours, oracle, plain in zip(leaves.tensors, exact.tensors, dense.tensors, strict=True):
        if not ours.requires_grad:
            continue
        assert ours.grad.dtype == ours.dtype
        base = torch.linalg.norm(plain.grad.to(ours.dtype).double() - oracle.grad)
        error = torch.linalg.norm(ours.grad.double() - oracle.grad)
        rounding = 2**-8 if ours.dtype == BF16 else 1e-5
        assert error <= 1.2 * base + rounding * torch.linalg.norm(oracle.grad) + 1e-7


def dense_statistics(inputs):
    """Return log p(label), log p(top), entropy and lse of every row, 0 where it is ignored."""
    log_probs, is_scored = dense_log_probs(inputs), inputs.labels != -100
    index = torch.where(is_scored, inputs.labels, 0)[:, None]
    rows = (
        log_probs.gather(1, index)[:, 0],
        log_probs.scatter(1, index, -torch.inf).amax(dim=1),
        -(log_probs.exp() * log_probs).sum(dim=1),
        dense_logits(inputs).logsumexp(dim=1),
    )
    return [torch.where(is_scored, values, 0.0) for values in rows]


@DRAWN
@given(calls(), st.tuples(*[SLOPES] * 4), BUDGETS, st.sampled_from(["auto", "stash", "recompute"]))
def test_statistics_and_their_gradients(drawn, slopes, budgets, memory):
    leaves, exact, dense = drawn
    stats = leaves.call(linear_logprob_stats, backend="cpu", memory=memory, **budgets)
    ours = [stats.token_logps, stats.top_non_label_logps, stats.entropy, stats.lse]
    expected = dense_statistics(exact)
    size = 1 + dense_logits(exact).abs().amax(dim=1)
    for actual, oracle in zip(ours, expected, strict=True):
        assert ((actual - oracle).abs() <= 2e-6 * size).all()
    # A factor of its own for every row, and slopes of 0 for none.
    factors = torch.randn(len(size), generator=seeded(1), dtype=F64)
    for values in (ours, expected, dense_statistics(dense)):
        parts = [
            (slope * factors.to(part.dtype) * part).sum()
            for slope, part in zip(slopes, values, strict=True)
            if slope != 0
        ]
        torch.stack([0.0 * values[0].sum(), *parts]).sum().backward()
    assert_close_gradients(leaves, exact, dense)


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
def test_losses_and_their_gradients(
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
    expected, plain = (
        dense_loss(inputs, ids, ref_logps, objective, weights, rejected_scoring)
        for inputs in (exact, dense)
    )
    size = 1 + float(dense_logits(exact).detach().abs().max())
    for actual, oracle in zip(ours, expected, strict=False):
        torch.testing.assert_close(actual.double(), oracle, rtol=2e-6, atol=2e-6 * size * num_rows)
    for loss, logps, *_ in (ours, expected, plain):
        (loss + (upstream.to(logps.dtype) * logps).sum()).backward()
    assert_close_gradients(leaves, exact, dense)
