"""Every statistic of linear_logprob_stats against the dense distribution."""

from __future__ import annotations

import math

import pytest
import torch

from realign_kernels import LogprobStats, linear_logprob, linear_logprob_stats
from realign_kernels.testing import dense_log_probs, dense_logits, make_head_inputs

pytestmark = pytest.mark.usefixtures("each_backend")


def dense_stats(inputs):
    """The definitions, one line each."""
    is_scored = inputs.labels != -100
    index = torch.where(is_scored, inputs.labels, 0)[:, None]
    log_probs, logits = dense_log_probs(inputs), dense_logits(inputs)
    tops = log_probs.scatter(1, index, -torch.inf).max(dim=1)
    values = LogprobStats(
        token_logps=log_probs.gather(1, index).squeeze(1),
        entropy=torch.special.entr(log_probs.exp()).sum(1),
        log_sum_sq_probs=(2 * log_probs).logsumexp(1),
        mean_logits=logits.mean(1),
        is_top1=log_probs.argmax(1) == index[:, 0],
        top_non_label_logps=tops.values,
        top_non_label_ids=tops.indices,
        lse=logits.logsumexp(1),
    )
    fills = LogprobStats(0.0, 0.0, 0.0, 0.0, False, 0.0, -1, 0.0)
    pairs = zip(values, fills, strict=True)
    return LogprobStats(*(torch.where(is_scored, value, fill) for value, fill in pairs))


@pytest.mark.parametrize("V", [2, 3, 16, 17, 37])
@pytest.mark.parametrize(
    "options", [{}, {"logit_softcap": 3.0, "logit_scale": 1.2, "temperature": 0.8}], ids=str
)
@pytest.mark.usefixtures("small_tiles")
def test_statistics_equal_their_dense_definitions(V, options):
    inputs = make_head_inputs(23, V, 5, ignored=0.2, bias=True, rank=2, **options)
    actual = inputs.call(linear_logprob_stats)
    for name, ours, expected in zip(actual._fields, actual, dense_stats(inputs), strict=True):
        torch.testing.assert_close(ours, expected, msg=lambda text, name=name: f"{name}: {text}")


def test_token_logps_are_those_of_linear_logprob():
    """Fused backends leave the best other token out of the sum: the last bit may differ."""
    inputs = make_head_inputs(23, 37, 5, torch.float32, ignored=0.2, bias=True)
    actual, expected = inputs.call(linear_logprob_stats).token_logps, inputs.call(linear_logprob)
    torch.testing.assert_close(actual, expected, rtol=3e-7, atol=3e-7)


def test_a_uniform_distribution_has_its_known_statistics():
    stats = linear_logprob_stats(torch.zeros(2, 3), torch.zeros(50, 3), torch.tensor([0, 7]))
    torch.testing.assert_close(stats.entropy, torch.full((2,), math.log(50)))
    torch.testing.assert_close(stats.log_sum_sq_probs, torch.full((2,), -math.log(50)))
    assert stats.top_non_label_ids.tolist() == [1, 0]
    assert stats.is_top1.tolist() == [True, False]


@pytest.mark.parametrize("label", [3, 17, 20, 36])
@pytest.mark.usefixtures("small_tiles")
def test_ties_go_to_the_lowest_id_across_tiles(label):
    """There are three equal maxima, one of them in another tile."""
    weight = torch.zeros(37, 1, dtype=torch.float64)
    weight[[3, 17, 20]] = 1.0
    stats = linear_logprob_stats(
        torch.ones(1, 1, dtype=torch.float64),
        weight,
        torch.tensor([label]),
    )
    assert stats.top_non_label_ids.item() == (17 if label == 3 else 3)
    assert stats.is_top1.item() == (label == 3)


def test_one_token_vocabulary_has_no_top_non_label():
    stats = linear_logprob_stats(torch.ones(2, 3), torch.ones(1, 3), torch.tensor([0, -100]))
    assert stats.top_non_label_logps.tolist() == [-math.inf, 0.0]
    assert stats.top_non_label_ids.tolist() == [-1, -1]
    assert stats.is_top1.tolist() == [True, False]
    assert stats.entropy.tolist() == [0.0, 0.0]
    assert stats.log_sum_sq_probs.tolist() == [0.0, 0.0]


@pytest.mark.parametrize("removed", [[0], [0, 1, 2], list(range(16)), list(range(16, 37))])
@pytest.mark.usefixtures("small_tiles")
def test_tokens_of_minus_infinity_are_not_counted(removed):
    inputs = make_head_inputs(9, 37, 5, bias=True)
    inputs.options["lm_head_bias"][removed] = -torch.inf
    actual = inputs.call(linear_logprob_stats)
    expected = dense_stats(inputs)
    for name in ("token_logps", "entropy", "log_sum_sq_probs", "top_non_label_logps"):
        torch.testing.assert_close(getattr(actual, name), getattr(expected, name))
    assert torch.equal(actual.top_non_label_ids, expected.top_non_label_ids)
    assert (actual.mean_logits == -torch.inf).all()


def test_the_only_possible_token_is_certain_and_others_are_impossible():
    bias = torch.tensor([-torch.inf, 0.0, -torch.inf])
    stats = linear_logprob_stats(
        torch.zeros(2, 1), torch.zeros(3, 1), torch.tensor([1, 2]), lm_head_bias=bias
    )
    assert stats.token_logps.tolist() == [0.0, -math.inf]
    assert stats.top_non_label_logps.tolist() == [-math.inf, 0.0]
    assert stats.top_non_label_ids.tolist() == [0, 1]
    assert stats.entropy.tolist() == [0.0, 0.0]
    assert stats.log_sum_sq_probs.tolist() == [0.0, 0.0]


def test_nan_stays_in_its_row():
    inputs = make_head_inputs(5, 37, 4)
    inputs.hidden_states[2] = torch.nan
    stats = inputs.call(linear_logprob_stats)
    for name in (
        "token_logps",
        "entropy",
        "log_sum_sq_probs",
        "mean_logits",
        "top_non_label_logps",
        "lse",
    ):
        assert torch.isnan(getattr(stats, name)).tolist() == [row == 2 for row in range(5)]


def test_only_differentiable_statistics_have_gradients():
    stats = make_head_inputs(5, 11, 4).as_leaves().call(linear_logprob_stats)
    assert [name for name in stats._fields if getattr(stats, name).requires_grad] == [
        "token_logps",
        "entropy",
        "top_non_label_logps",
        "lse",
    ]


def test_small_entropies_are_accurate_in_float32():
    """One token with a gap of 30 nats: the entropy is about 30 e-30, not a rounding error."""
    gap = torch.tensor([[30.0]])
    weight = torch.tensor([[1.0], [0.0]])
    stats = linear_logprob_stats(gap, weight, torch.tensor([0]))
    miss = torch.sigmoid(-gap.double())
    expected = torch.special.entr(miss) + miss * (1 - miss / 2) * (1 - miss)
    torch.testing.assert_close(stats.entropy.double(), expected[:, 0], rtol=5e-6, atol=0)
