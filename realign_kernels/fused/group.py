"""Tensor parallelism: the merge of the sums over the vocabulary shards of all ranks."""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch

if TYPE_CHECKING:
    from collections.abc import Callable

    from torch import Tensor

    from realign_kernels.backends.kernel_set import RowState
    from realign_kernels.head import LogitTransform
    from realign_kernels.vocabulary import VocabularyShard


def reduce_over_group(
    vocabulary: VocabularyShard,
    transform: LogitTransform,
    state: RowState,
    move_shifts: Callable[[Tensor, Tensor], None],
    add_back: Callable[[slice, Tensor, Tensor], None],
) -> None:
    """Merge the sums of every rank: MAX of shifts and tops, MIN of top ids, SUM of the sums.

    Accumulators are made relative to the common shift by ``move_shifts``, and summed later, when
    they contain the labels.  ``add_back`` adds multiples of rows of the weight to them.
    """
    own_shift = state.shift.clone()
    vocabulary.all_reduce_max_(state.shift)
    move_shifts(own_shift, state.shift)
    log_decay = torch.where(own_shift == state.shift, 0.0, own_shift - state.shift)
    decay = torch.exp(log_decay)
    if state.rest_entropy_sum is not None and state.rest_square_sum is not None:
        moved = decay * state.rest_entropy_sum - decay * log_decay * state.rest_sum
        state.rest_entropy_sum.copy_(torch.where(decay == 0, 0.0, moved))
        state.rest_square_sum.mul_(decay.square())
    state.rest_sum.mul_(decay)
    if state.label_logits is not None:
        vocabulary.all_reduce_max_(state.label_logits)
    if state.top_logits is not None and state.top_ids is not None:
        _keep_one_top(vocabulary, transform, state, state.top_logits, state.top_ids, add_back)
    summed = (state.rest_sum, state.rest_entropy_sum, state.rest_square_sum, state.logit_sum)
    parts = [part for part in summed if part is not None]
    for part, total in zip(parts, vocabulary.all_reduce_sum_(torch.stack(parts)), strict=True):
        part.copy_(total)


def _keep_one_top(
    vocabulary: VocabularyShard,
    transform: LogitTransform,
    state: RowState,
    top_logits: Tensor,
    top_ids: Tensor,
    add_back: Callable[[slice, Tensor, Tensor], None],
) -> None:
    """Find the top token of all ranks; those of the other ranks join the rest."""
    own_logits = top_logits.clone()
    past_any = torch.iinfo(torch.int64).max
    vocabulary.all_reduce_max_(top_logits)
    is_candidate = (top_ids >= 0) & (own_logits == top_logits)
    winners = torch.where(is_candidate, top_ids + vocabulary.start, past_any)
    vocabulary.all_reduce_min_(winners)
    is_beaten = (top_ids >= 0) & (top_ids + vocabulary.start != winners)
    log_e = torch.where(is_beaten, own_logits - state.shift, -torch.inf)
    e = torch.exp(log_e)
    state.rest_sum.add_(e)
    if state.rest_entropy_sum is not None and state.rest_square_sum is not None:
        state.rest_entropy_sum.add_(torch.where(e == 0, 0.0, -e * log_e))
        state.rest_square_sum.add_(e.square())
    values = torch.where(is_beaten, e * transform.slope(own_logits), 0.0)
    add_back(slice(0, len(values)), torch.where(is_beaten, top_ids, -1), values)
    top_ids.copy_(torch.where(winners == past_any, -1, winners - vocabulary.start))
