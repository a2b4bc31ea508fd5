"""Weights of tokens, and statistics of cells, in the preference loss: against dense float64."""

from __future__ import annotations

import pytest
import torch

from realign_kernels import (
    Objective,
    RdpoOutput,
    RdpoStatsOutput,
    Term,
    linear_logprob_stats,
    preference_loss,
    rdpo_loss,
)
from realign_kernels.testing import HeadInputs, dense_log_probs, make_head_inputs

pytestmark = pytest.mark.usefixtures("each_backend")

MODES = ["stash", "recompute", "tile"]
NUM_CELLS, NUM_PAIRS, NUM_POSITIONS, D, V = 3, 4, 3, 6, 23
OBJECTIVE = Objective((Term((1, -1)), Term((1, 0, -1), link="ipo")), nll_weight=0.2)


def batch(dtype=torch.float64):
    inputs = make_head_inputs(NUM_CELLS * NUM_PAIRS * NUM_POSITIONS, V, D, dtype, ignored=0.3)
    shape = NUM_CELLS * NUM_PAIRS, NUM_POSITIONS
    labels = inputs.labels.reshape(shape).clone()
    labels[:, 0] = torch.arange(len(labels)) % V
    labels[-1] = -100  # an absent cell
    weights = torch.linspace(-0.5, 2.0, labels.numel()).reshape(shape)
    weights[labels == -100] = torch.nan
    ref_logps = torch.linspace(-2.0, 1.0, NUM_CELLS * NUM_PAIRS).view(NUM_CELLS, NUM_PAIRS)
    return (
        inputs.hidden_states.reshape(*shape, D),
        inputs.lm_head_weight,
        labels,
        weights,
        ref_logps,
    )


def dense_logps(hidden, weight, labels, scoring="label", sequence_ids=None):
    """Log-probabilities of tokens, 0 where they are ignored."""
    log_probs = dense_log_probs(HeadInputs(hidden, weight, labels, {}))
    is_scored = labels != -100
    index = torch.where(is_scored, labels, 0)[..., None]
    tokens = log_probs.gather(-1, index)[..., 0]
    if scoring == "top_non_label":
        others = log_probs.scatter(-1, index, -torch.inf).amax(dim=-1)
        ids = torch.arange(len(labels))[:, None] if sequence_ids is None else sequence_ids
        is_chosen = ids < NUM_PAIRS
        tokens = torch.where(is_chosen, tokens, others)
    return torch.where(is_scored, tokens, 0.0)


def in_form(hidden, labels, weights, *, packed):
    """The batch as it is, or its tokens in another order."""
    if not packed:
        return hidden, labels, weights, {}
    order = torch.randperm(labels.numel())
    ids = torch.arange(len(labels))[:, None].expand(labels.shape).reshape(-1)[order]
    flat = hidden.reshape(-1, D)[order], labels.reshape(-1)[order], weights.reshape(-1)[order]
    return *flat, {"sequence_ids": ids}


@pytest.mark.parametrize("packed", [False, True])
@pytest.mark.parametrize("scoring", ["label", "top_non_label"])
@pytest.mark.parametrize("memory", ["frozen", *MODES])
def test_token_weights_equal_the_dense_formula(memory, scoring, packed, monkeypatch):
    monkeypatch.setattr("realign_kernels.ops.pair_tiles._ROWS_PER_TILE", 9)
    hidden, weight, labels, weights, ref_logps = batch()
    given, given_labels, given_weights, form = in_form(hidden, labels, weights, packed=packed)
    leaves = [given.clone().requires_grad_(), weight.clone().requires_grad_(memory != "frozen")]
    output = rdpo_loss(
        *leaves, given_labels, ref_logps, token_weights=given_weights, objective=OBJECTIVE,
        rejected_scoring=scoring, memory="auto" if memory == "frozen" else memory, **form,
    )  # fmt: skip
    exact = [part.clone().requires_grad_() for part in (given, weight)]
    tokens = dense_logps(*exact, given_labels, scoring, **form)
    if packed:
        tokens = torch.zeros(NUM_CELLS * NUM_PAIRS, dtype=torch.float64).index_add(
            0, form["sequence_ids"], tokens * given_weights.nan_to_num()
        )
    else:
        tokens = (tokens * weights.nan_to_num()).sum(dim=1)
    logps = tokens.view(NUM_CELLS, NUM_PAIRS)
    counts = (labels != -100).sum(dim=1).view(NUM_CELLS, NUM_PAIRS)
    oracle = preference_loss(logps, ref_logps.double(), OBJECTIVE, num_tokens=counts).loss
    torch.testing.assert_close(output.loss, oracle)
    torch.testing.assert_close(output.logps, logps)
    assert torch.equal(output.num_tokens, counts)
    # through both results that have a gradient
    slopes = torch.linspace(-1, 1, logps.numel()).double().view_as(logps)
    (output.loss * 1.7 + (output.logps * slopes).sum()).backward()
    (oracle * 1.7 + (logps * slopes).sum()).backward()
    for leaf, other in zip(leaves, exact, strict=True):
        if leaf.requires_grad:
            torch.testing.assert_close(leaf.grad, other.grad)


def test_weights_of_one_change_nothing():
    hidden, weight, labels, weights, ref_logps = batch()
    expected = rdpo_loss(hidden, weight, labels, ref_logps)
    actual = rdpo_loss(hidden, weight, labels, ref_logps, token_weights=torch.ones_like(weights))
    torch.testing.assert_close(actual, expected, rtol=0, atol=0)


@pytest.mark.parametrize("packed", [False, True])
@pytest.mark.parametrize("scoring", ["label", "top_non_label"])
@pytest.mark.parametrize("memory", ["frozen", *MODES])
def test_cell_statistics_equal_the_means_over_tokens(memory, scoring, packed, monkeypatch):
    monkeypatch.setattr("realign_kernels.ops.pair_tiles._ROWS_PER_TILE", 9)
    hidden, weight, labels, weights, ref_logps = batch()
    stats = linear_logprob_stats(hidden, weight, labels)
    hidden, given_labels, _, form = in_form(hidden, labels, weights, packed=packed)
    results = []
    for statistics in (False, True):
        leaves = [hidden.clone().requires_grad_(), weight.clone().requires_grad_()]
        leaves[1].requires_grad_(memory != "frozen")
        output = rdpo_loss(
            *leaves, given_labels, ref_logps, statistics=statistics, rejected_scoring=scoring,
            memory="auto" if memory == "frozen" else memory, **form,
        )  # fmt: skip
        needed = [leaf for leaf in leaves if leaf.requires_grad]
        results.append((output, torch.autograd.grad(output.loss + output.logps.sum(), needed)))
    (plain, plain_grads), (output, grads) = results
    assert type(plain) is RdpoOutput
    assert type(output) is RdpoStatsOutput
    torch.testing.assert_close(output[:6], tuple(plain))
    torch.testing.assert_close(grads, plain_grads)
    is_scored = labels != -100
    counts = is_scored.sum(dim=1).clamp(min=1)
    for actual, tokens in (
        (output.entropy, stats.entropy),
        (output.mean_logits, stats.mean_logits),
        (output.top1_rate, stats.is_top1.double()),
    ):
        expected = (torch.where(is_scored, tokens, 0.0).sum(dim=1) / counts).view(3, NUM_PAIRS)
        torch.testing.assert_close(actual, expected.detach())
        assert not actual.requires_grad
    assert output.entropy[-1, -1] == 0


@pytest.mark.parametrize("memory", MODES)
def test_token_weights_and_statistics_compile_into_one_graph(memory):
    hidden, weight, labels, weights, ref_logps = batch(torch.float32)
    leaves = [hidden.requires_grad_(), weight.requires_grad_()]

    def loss(hidden, weight):
        output = rdpo_loss(
            hidden, weight, labels, ref_logps, token_weights=weights, statistics=True, memory=memory
        )
        return output.loss, output.entropy

    torch._dynamo.reset()
    compiled = torch.compile(loss, fullgraph=True, backend="aot_eager")
    actual, expected = compiled(*leaves), loss(*leaves)
    torch.testing.assert_close(actual, expected)
    torch.testing.assert_close(
        torch.autograd.grad(actual[0], leaves), torch.autograd.grad(expected[0], leaves)
    )


@pytest.mark.parametrize(
    ("weights", "error", "message"),
    [
        ([1.0], TypeError, r"token_weights must be a torch\.Tensor, got list\. Call torch\.as"),
        (torch.ones(12, 3).half(), TypeError, "token_weights must be torch.float32 or"),
        (torch.ones(12), ValueError, r"token_weights must have shape \(12, 3\) .* got \(12,\)"),
        (torch.ones(12, 3, device="meta"), ValueError, "token_weights must be on cpu"),
        (torch.ones(12, 3, requires_grad=True), ValueError, "must not require a gradient"),
    ],
    ids=["list", "half", "shape", "device", "gradient"],
)
def test_invalid_token_weights_are_refused(weights, error, message):
    hidden, weight, labels, _, ref_logps = batch()
    with pytest.raises(error, match=message):
        rdpo_loss(hidden, weight, labels, ref_logps, token_weights=weights)


def test_the_statistics_option_must_be_a_bool():
    hidden, weight, labels, _, ref_logps = batch()
    with pytest.raises(TypeError, match="statistics must be True or False, got 'yes'"):
        rdpo_loss(hidden, weight, labels, ref_logps, statistics="yes")
