"""Terms by length, and the objectives of other papers that are written with the head."""

from __future__ import annotations

import math

import pytest
import torch
import torch.nn.functional as F

from realign_kernels import Objective, Term, linear_logprob, preference_loss, rdpo_loss
from realign_kernels.testing import HeadInputs, dense_logprob, make_head_inputs

pytestmark = pytest.mark.usefixtures("each_backend")

OBJECTIVES = {
    "SimPO": Objective((Term((1, -1), beta=2.0, offset=1.6, normalize="length"),)),
    "smoothed": Objective((Term((1, -1), label_smoothing=0.2, normalize="length"),)),
    "hinge": Objective((Term((1, -1), beta=2.0, link="hinge", normalize="length"),)),
    "ipo": Objective((Term((1, -1), link="ipo", normalize="length"),)),
    "mixed": Objective((Term((1, -1), normalize="length"), Term((1, -1)), Term((1,), link="ipo"))),
}
NUM_PAIRS, NUM_POSITIONS, D, V = 4, 5, 6, 23


def batch(dtype=torch.float64):
    inputs = make_head_inputs(2 * NUM_PAIRS * NUM_POSITIONS, V, D, dtype, ignored=0.4)
    shape = 2 * NUM_PAIRS, NUM_POSITIONS
    labels = inputs.labels.reshape(shape).clone()
    labels[:, 0] = 3
    return inputs.hidden_states.reshape(*shape, D), inputs.lm_head_weight, labels


def dense_sums(hidden, weight, labels):
    """Sums of log-probabilities and numbers of tokens, (2, P)."""
    tokens = dense_logprob(HeadInputs(hidden, weight, labels, {}))
    counts = (labels != -100).sum(dim=1)
    return tokens.sum(dim=1).view(2, NUM_PAIRS), counts.view(2, NUM_PAIRS)


def written_out(name, logps, counts):
    """The losses of the papers, one line each."""
    means = logps / counts
    margin = means[0] - means[1]
    simpo = -F.logsigmoid(2.0 * margin - 1.6)
    x = 0.1 * margin
    return {
        "SimPO": simpo,
        "smoothed": -0.8 * F.logsigmoid(x) - 0.2 * F.logsigmoid(-x),
        "hinge": torch.relu(1 - 2.0 * margin),
        "ipo": (margin - 5.0).square(),
        "mixed": -F.logsigmoid(x)
        - F.logsigmoid(0.1 * (logps[0] - logps[1]))
        + (means[0] - 5.0).square(),
    }[name].mean()


@pytest.mark.parametrize("memory", ["stash", "tile"])
@pytest.mark.parametrize("objective", OBJECTIVES)
def test_terms_normalised_by_length_equal_their_formula(objective, memory):
    hidden, weight, labels = batch()
    leaves = [part.clone().requires_grad_() for part in (hidden, weight)]
    exact = [part.clone().requires_grad_() for part in (hidden, weight)]
    loss = rdpo_loss(
        *leaves, labels, torch.zeros(2, NUM_PAIRS), objective=OBJECTIVES[objective], memory=memory
    ).loss
    logps, counts = dense_sums(*exact, labels)
    oracle = written_out(objective, logps, counts)
    torch.testing.assert_close(loss, oracle)
    specified = preference_loss(logps, None, OBJECTIVES[objective], num_tokens=counts).loss
    torch.testing.assert_close(specified, oracle)
    grads = torch.autograd.grad(loss, leaves)
    torch.testing.assert_close(grads, torch.autograd.grad(oracle, exact))


@pytest.mark.parametrize("objective", OBJECTIVES.values(), ids=OBJECTIVES)
def test_a_table_of_terms_round_trips_to_its_objective(objective):
    returned = Objective.from_table(objective.table(), objective.nll_weight)
    assert returned.table() == objective.table()
    assert [term.is_per_token for term in returned.terms] == [
        term.is_per_token for term in objective.terms
    ]


def test_length_normalized_terms_require_num_tokens():
    message = r"num_tokens must be given .* normalize='length' and nll_weight, got None"
    with pytest.raises(ValueError, match=message):
        preference_loss(torch.zeros(2, 3), None, OBJECTIVES["SimPO"])
    with pytest.raises(ValueError, match=r"normalize must be one of \['none', 'length'\], got 'm"):
        Term((1, -1), normalize="mean")
    with pytest.raises(TypeError, match=r"normalize must be one of \['none', 'length'\], got N"):
        Term((1, -1), normalize=None)


def orpo_loss(hidden_states, lm_head_weight, labels, weight=0.1):
    """ORPO as docs/guides/head.md has it."""
    token_logps = linear_logprob(hidden_states, lm_head_weight, labels)
    num_tokens = (labels != -100).sum(dim=-1)
    chosen, rejected = (token_logps.sum(dim=-1) / num_tokens).chunk(2)
    log_odds = chosen - rejected - torch.log1p(-chosen.exp()) + torch.log1p(-rejected.exp())
    return (-chosen - weight * F.logsigmoid(log_odds)).mean()


def kto_loss(hidden_states, lm_head_weight, labels, ref_logps, is_desirable, kl, beta=0.1):
    """KTO as docs/guides/head.md has it; ``kl`` is the batch's estimate, without a gradient."""
    logps = linear_logprob(hidden_states, lm_head_weight, labels).sum(dim=-1)
    rewards = beta * (logps - ref_logps)
    baseline = beta * kl.clamp(min=0)
    values = torch.where(is_desirable, rewards - baseline, baseline - rewards)
    return (1 - torch.sigmoid(values)).mean()


def test_orpo_equals_its_formula():
    hidden, weight, labels = batch()
    leaves = [part.clone().requires_grad_() for part in (hidden, weight)]
    exact = [part.clone().requires_grad_() for part in (hidden, weight)]
    logps, counts = dense_sums(*exact, labels)
    means = logps / counts
    odds = means.exp() / (1 - means.exp())
    oracle = (-means[0] - 0.1 * F.logsigmoid(torch.log(odds[0] / odds[1]))).mean()
    loss = orpo_loss(*leaves, labels)
    torch.testing.assert_close(loss, oracle)
    torch.testing.assert_close(
        torch.autograd.grad(loss, leaves), torch.autograd.grad(oracle, exact)
    )


def test_kto_equals_its_formula():
    hidden, weight, labels = batch()
    leaves = [part.clone().requires_grad_() for part in (hidden, weight)]
    exact = [part.clone().requires_grad_() for part in (hidden, weight)]
    logps, _ = dense_sums(*exact, labels)
    ref_logps = torch.linspace(-30, -5, 2 * NUM_PAIRS).double()
    is_desirable = torch.arange(2 * NUM_PAIRS) % 3 == 0
    kl = torch.tensor(1.7).double()
    margins = 0.1 * (logps.reshape(-1) - ref_logps) - 0.17
    oracle = torch.where(is_desirable, torch.sigmoid(-margins), torch.sigmoid(margins)).mean()
    loss = kto_loss(*leaves, labels, ref_logps, is_desirable, kl)
    torch.testing.assert_close(loss, oracle)
    torch.testing.assert_close(
        torch.autograd.grad(loss, leaves), torch.autograd.grad(oracle, exact)
    )
    # at the reference, without a divergence, every answer is worth one half
    same = kto_loss(*leaves, labels, logps.reshape(-1).detach(), is_desirable, torch.tensor(0.0))
    assert math.isclose(same.item(), 0.5, rel_tol=1e-9)
