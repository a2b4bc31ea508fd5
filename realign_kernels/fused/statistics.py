"""Statistics of each row's distribution, from the sums of a pass.  Letters as in ``forward.py``."""

from __future__ import annotations

from typing import TYPE_CHECKING, NamedTuple

import torch
from torch import Tensor

from realign_kernels.fused.forward import NO_TOKEN, PassResult
from realign_kernels.fused.gradients import RowNumbers, log_share_beside_label, top_log_probs

if TYPE_CHECKING:
    from realign_kernels.vocabulary import VocabularyShard


class Statistics(NamedTuple):
    """Entries of ``LogprobStats`` beside the two log-probabilities, (N,) each."""

    entropy: Tensor
    log_sum_sq_probs: Tensor
    mean_logits: Tensor
    is_top1: Tensor
    top_non_label_ids: Tensor
    lse: Tensor


def statistics(
    result: PassResult,
    numbers: RowNumbers,
    token_logps: Tensor,
    labels: Tensor,
    vocabulary: VocabularyShard,
) -> Statistics:
    """Turn sums over the vocabulary into statistics of the distribution."""
    num_rows = len(token_logps)

    def rows(tensor: Tensor | None) -> Tensor:
        assert tensor is not None  # a pass with statistics fills in all of them
        return tensor[:num_rows]

    square_sum = rows(result.state.rest_square_sum) + torch.exp(2 * _tracked(numbers.log_top))
    # Label, top token and the rest are separate: where one has nearly all mass, nothing cancels.
    rest, top = numbers.rest_sum, torch.exp(_tracked(numbers.log_top))
    log_rest = torch.log(rest)
    rest_logps = log_share_beside_label(numbers, log_rest, top)
    rest_entropy = log_rest + rows(result.state.rest_entropy_sum) / rest
    rest_entropy = torch.where(rest > 0, rest_entropy, 0.0)
    label_logits = rows(result.state.label_logits)
    top_ids = _global_top_ids(numbers, labels, vocabulary)
    top_logits = rows(result.state.top_logits)
    is_first_of_equals = (label_logits == top_logits) & (labels < top_ids)
    return Statistics(
        entropy=_minus_p_log_p(token_logps)
        + _minus_p_log_p(top_log_probs(numbers))
        + _minus_p_log_p(rest_logps)
        + torch.exp(rest_logps) * rest_entropy,
        log_sum_sq_probs=torch.logaddexp(
            2 * token_logps, torch.log(square_sum) - 2 * numbers.log_total
        ),
        mean_logits=rows(result.state.logit_sum) / vocabulary.total,
        is_top1=(label_logits > top_logits) | is_first_of_equals,
        top_non_label_ids=top_ids,
        lse=torch.where(torch.isnan(token_logps), torch.nan, numbers.lse),
    )


def _global_top_ids(numbers: RowNumbers, labels: Tensor, vocabulary: VocabularyShard) -> Tensor:
    """Return ids in the whole vocabulary; the lowest beside the label if no logit is finite."""
    assert numbers.top_ids is not None
    assert numbers.top_logits is not None
    lowest = torch.where(labels == 0, 1, 0)
    lowest = torch.where(lowest < vocabulary.total, lowest, NO_TOKEN)
    has_top = numbers.top_logits > -torch.inf
    return torch.where(has_top, numbers.top_ids + vocabulary.start, lowest)


def _tracked(log_top: Tensor | None) -> Tensor:
    assert log_top is not None  # a pass with statistics tracks the top token
    return log_top


def _minus_p_log_p(log_p: Tensor) -> Tensor:
    return torch.where(log_p == -torch.inf, 0.0, -log_p * torch.exp(log_p))
