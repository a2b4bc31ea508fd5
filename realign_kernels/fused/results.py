"""What a forward of the fused backends returns and keeps, put together from one pass.

Letters: **M** positions, **N** of them scored, **D** hidden size, **V** vocabulary of this shard.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from realign_kernels.fused.forward import (
    FusedCall,
    Keeps,
    PassResult,
    Rows,
    gather_rows,
    walk_vocabulary,
)
from realign_kernels.fused.gradients import hidden_gradient
from realign_kernels.fused.scores import (
    RowNumbers,
    Statistics,
    by_scoring,
    logit_gradient,
    statistics,
    token_log_probs,
    top_log_probs,
)


class FusedScores(NamedTuple):
    """Outputs of the forward, in the order of its schema; empty where they were not asked for."""

    token_logps: Tensor  # (M,), like those down to top_non_label_ids
    top_non_label_logps: Tensor
    entropy: Tensor
    log_sum_sq_probs: Tensor
    mean_logits: Tensor
    is_top1: Tensor
    top_non_label_ids: Tensor
    slopes: Tensor  # (N, D): derivative of token_logps in the hidden states; not yet rounded
    top_slopes: Tensor  # (N, D): derivative of top_non_label_logps
    positions: Tensor  # (N,) int64, of scored rows
    numbers: Tensor  # (3 or 4, N): floating entries of RowNumbers; without slopes, as are the rest
    top_ids: Tensor  # (N,) int64
    stash: Tensor  # (N, V); (0, V) where it is computed anew


def score_rows(
    call: FusedCall,
    hidden_states: Tensor,
    labels: Tensor,
    positions: Tensor,
    keeps: Keeps,
    top_rows: Tensor | None,
    with_statistics: bool,
) -> FusedScores:
    """Score the rows at ``positions``; ``keeps`` is settled."""
    num_rows = len(positions)
    rows = gather_rows(call, hidden_states, labels, positions)
    tracks_top = with_statistics or top_rows is not None
    result = walk_vocabulary(
        call, rows, keeps, with_statistics=with_statistics, tracks_top=tracks_top
    )
    numbers = RowNumbers.of(result, num_rows)
    scored_labels = labels[positions]
    row_logps = token_log_probs(numbers)
    outputs = {name: row_logps.new_empty(0) for name in FusedScores._fields}
    spread = _Spread(positions, len(labels))
    if with_statistics:
        row_statistics = statistics(result, numbers, row_logps, scored_labels, call.vocabulary)
        top_logps = top_log_probs(numbers).masked_fill(row_logps.isnan(), torch.nan)
        outputs["top_non_label_logps"] = spread(top_logps)
        for name in Statistics._fields:
            fill = -1 if name == "top_non_label_ids" else 0
            outputs[name] = spread(getattr(row_statistics, name), fill)
    else:
        outputs |= _empty_statistics(row_logps)
    if keeps is Keeps.SLOPES:
        is_top = None if top_rows is None else top_rows[positions]
        outputs["slopes"], outputs["top_slopes"] = _slopes(
            call, rows, numbers, result, is_top, with_statistics
        )
    if top_rows is not None:
        row_logps = torch.where(top_rows[positions], top_log_probs(numbers), row_logps)
    outputs["token_logps"] = spread(row_logps)
    is_saved = keeps in (Keeps.STASH, Keeps.NUMBERS)
    saved = [number for number in numbers[:4] if number is not None]
    outputs["numbers"] = torch.stack([part if is_saved else part[:0] for part in saved])
    has_backward = keeps is not Keeps.NOTHING
    outputs["positions"] = positions if has_backward else positions[:0].clone()
    top_ids = positions[:0].clone() if numbers.top_ids is None else numbers.top_ids
    outputs["top_ids"] = top_ids.clone() if is_saved else top_ids[:0].clone()
    stash = result.stash
    if stash is None:
        stash = hidden_states.new_empty(0, call.vocabulary.size, dtype=call.operand)
    outputs["stash"] = stash[:num_rows]
    return FusedScores(**outputs)


def _empty_statistics(like: Tensor) -> dict[str, Tensor]:
    names = ("top_non_label_logps", "entropy", "log_sum_sq_probs", "mean_logits")
    empty = {name: like.new_empty(0) for name in names}
    empty["is_top1"] = like.new_empty(0, dtype=torch.bool)
    empty["top_non_label_ids"] = like.new_empty(0, dtype=torch.int64)
    return empty


class _Spread:
    """Puts results of rows back where their labels are."""

    def __init__(self, positions: Tensor, num_positions: int) -> None:
        self.positions, self.num_positions = positions, num_positions

    def __call__(self, rows: Tensor, fill: float = 0) -> Tensor:
        whole = rows.new_full((self.num_positions, *rows.shape[1:]), fill)
        whole[self.positions] = rows
        return whole


def _slopes(
    call: FusedCall,
    rows: Rows,
    numbers: RowNumbers,
    result: PassResult,
    is_top: Tensor | None,
    with_statistics: bool,
) -> tuple[Tensor, Tensor]:
    """Return derivatives in the hidden states: of what a row is scored by, and of its top token."""
    accumulator, low_rank = result.accumulator, result.low_rank_accumulator
    assert accumulator is not None
    ones = torch.ones_like(numbers.shift)

    def slopes_of(
        grad_label: Tensor, grad_top: Tensor | None, total: Tensor, low_rank_total: Tensor | None
    ) -> Tensor:
        gradient = logit_gradient(numbers, call.transform, grad_label, grad_top)
        hidden, _ = hidden_gradient(call, rows, gradient, numbers.top_ids, total, low_rank_total)
        return hidden

    top_slopes = accumulator.new_empty(0)
    if with_statistics:
        low_rank_copy = None if low_rank is None else low_rank.clone()
        top_slopes = slopes_of(torch.zeros_like(ones), ones, accumulator.clone(), low_rank_copy)
    grad_label, grad_top = (ones, None) if is_top is None else by_scoring(is_top, ones)
    return slopes_of(grad_label, grad_top, accumulator, low_rank), top_slopes
