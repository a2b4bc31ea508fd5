"""``memory="tile"``: loss and gradients of a few whole pairs at a time.

A pair's loss needs only the sums of its own sequences, so its gradients can be computed while the
exponentials of its tokens are still in memory: 6NVD operations for a trainable head, and memory for
about 4096 rows of exponentials instead of N.  Letters as in ``score_tokens.py``; **P** pairs.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, NamedTuple

import torch
from torch import Tensor

from realign_kernels.fused.forward import Keeps, start_pass, walk_vocabulary
from realign_kernels.fused.gradients import (
    Gradients,
    LogitGradient,
    Needed,
    RowNumbers,
    Upstream,
    by_scoring,
    head_gradients,
    logit_gradient,
    token_log_probs,
    top_log_probs,
)
from realign_kernels.fused.statistics import statistics
from realign_kernels.ops.pair_loss import PairArguments, reduce_pairs

if TYPE_CHECKING:
    from collections.abc import Iterator

    from realign_kernels.fused.forward import FusedCall
    from realign_kernels.ops.score_tokens import HeadArguments

# Enough rows for products at full speed; more rows only cost memory.
_ROWS_PER_TILE = 4096


class TileArguments(NamedTuple):
    """Inputs of ``memory="tile"`` besides the head and the preference batch, which is packed."""

    top_rows: Tensor | None
    needed: list[bool]
    label_shape: list[int]
    witness: Tensor | None
    token_weights: Tensor | None = None  # (M,), 0 where the label is ignored
    with_statistics: bool = False


class TiledResult(NamedTuple):
    """Scores of every position, and gradients for an upstream gradient of 1."""

    token_logps: Tensor  # (M,)
    gradients: Gradients  # in the accumulation dtype; `hidden` is (..., D)
    positions: Tensor  # (N,)
    numbers: Tensor  # (3 or 4, N)
    top_ids: Tensor  # (N,)
    statistics: TokenStatistics | None


class TokenStatistics(NamedTuple):
    """Statistics of every position, (M,), 0 where the label is ignored; in the dtype of scores."""

    entropy: Tensor
    mean_logits: Tensor
    is_top1: Tensor


def score_and_differentiate(
    call: FusedCall,
    head: HeadArguments,
    batch: PairArguments,
    arguments: TileArguments,
    positions: Tensor,
    tokens_per_pair: list[int],
) -> TiledResult:
    """Score all tokens and differentiate the mean loss, one group of pairs at a time.

    The exponentials of a group fit the stash; if those of a single pair do not, they are computed
    twice.
    """
    hidden_states, objective = head.hidden_states, batch.objective
    top_rows, needed, with_statistics = (
        arguments.top_rows,
        Needed(*arguments.needed),
        arguments.with_statistics,
    )
    stashed_rows = head.budget[1] // head.stash_row_bytes()
    largest = min(_ROWS_PER_TILE, max(1, stashed_rows))
    tracks_top = top_rows is not None or with_statistics
    wide = call.accumulation
    token_logps = hidden_states.new_zeros(len(batch.labels), dtype=wide)
    token_statistics = None
    if with_statistics:
        token_statistics = TokenStatistics(
            *(torch.zeros_like(token_logps) for _ in TokenStatistics._fields)
        )
    numbers = token_logps.new_empty(4 if tracks_top else 3, len(positions))
    top_ids = torch.empty_like(positions) if tracks_top else positions[:0].clone()
    totals = _zero_gradients(call, hidden_states, needed)
    for first, stop, index in _groups_of_pairs(batch, positions, tokens_per_pair, largest):
        group_positions = positions[index]
        keeps = Keeps.STASH if len(group_positions) <= stashed_rows else Keeps.NUMBERS
        start = start_pass(
            call, hidden_states, batch.labels, group_positions, keeps,
            with_statistics=with_statistics, tracks_top=tracks_top,
        )  # fmt: skip
        rows = start.rows
        result = walk_vocabulary(call, start, keeps, with_statistics=with_statistics)
        row_numbers = RowNumbers.of(result, len(group_positions))
        row_kernels = None if tracks_top else call.row_kernels
        if row_kernels is not None and start.started is not None:
            logps = start.label_logits.new_empty(len(group_positions))
            row_kernels.finish_rows(call.head, call.transform, start.started, None, None, logps)
        else:
            logps = token_log_probs(row_numbers)
        if token_statistics is not None:
            found = statistics(
                result, row_numbers, logps, batch.labels[group_positions], call.vocabulary
            )
            for name, values in token_statistics._asdict().items():
                values[group_positions] = getattr(found, name).to(values.dtype)
        is_top = None if top_rows is None else top_rows[group_positions]
        if is_top is not None:
            logps = torch.where(is_top, top_log_probs(row_numbers), logps)
        group, group_ids = _pairs_between(batch, group_positions, first, stop)
        weights = (
            None
            if arguments.token_weights is None
            else arguments.token_weights[group_positions].to(logps.dtype)
        )
        weighted = logps if weights is None else logps * weights
        outputs, _ = reduce_pairs(weighted, head.backend, group, objective)
        slopes = outputs.coefficients.reshape(-1)
        share = group.pairs.num_pairs / batch.pairs.num_pairs
        grad = (slopes[group_ids] * share).to(logps.dtype)
        if weights is not None:
            grad = grad * weights
        grad_label, grad_top = (grad, None) if is_top is None else by_scoring(is_top, grad)
        if row_kernels is not None and start.started is not None:
            floating = start.started.numbers[:, : len(group_positions)].contiguous()
            graded = row_kernels.grade_rows(call.transform, floating, grad_label, None)
            gradient = LogitGradient(*graded, None)
        else:
            gradient = logit_gradient(row_numbers, call.transform, Upstream(grad_label, grad_top))
        stash = None if result.stash is None else result.stash[: len(group_positions)]
        grads = head_gradients(call, rows, row_numbers, gradient, stash, needed, totals)
        if totals.hidden is not None and grads.hidden is not None:
            totals.hidden.view(-1, grads.hidden.shape[1])[group_positions] = grads.hidden
        if totals.lora_a is not None and grads.lora_a is not None:
            totals.lora_a.add_(grads.lora_a)
        token_logps[group_positions] = logps
        for number, part in zip(numbers, row_numbers, strict=False):
            if part is not None:
                number[index] = part
        if row_numbers.top_ids is not None:
            top_ids[index] = row_numbers.top_ids
    return TiledResult(token_logps, totals, positions, numbers, top_ids, token_statistics)


def _zero_gradients(call: FusedCall, hidden_states: Tensor, needed: Needed) -> Gradients:
    head, wide = call.head, call.accumulation

    def zeros(tensor: Tensor | None, is_needed: bool) -> Tensor | None:
        if tensor is None or not is_needed:
            return None
        # Rounded only after scaling by the upstream gradient: float16 would lose small values.
        return tensor.new_zeros(tensor.shape, dtype=wide)

    return Gradients(
        hidden=zeros(hidden_states, needed.hidden),
        weight=zeros(head.weight, needed.weight),
        bias=zeros(head.bias, needed.bias),
        lora_a=zeros(head.lora_a, needed.lora_a),
        lora_b=zeros(head.lora_b, needed.lora_b),
    )


def _groups_of_pairs(
    batch: PairArguments, positions: Tensor, tokens_per_pair: list[int], largest: int
) -> Iterator[tuple[int, int, Tensor]]:
    """Yield each group's first pair, the pair after its last, and its indices in ``positions``."""
    assert batch.sequence_ids is not None
    pair_of_row = batch.sequence_ids[positions] % max(1, batch.pairs.num_pairs)
    first, num_rows = 0, 0
    for pair, count in enumerate([*tokens_per_pair, largest]):
        if num_rows > 0 and num_rows + count > largest:
            is_in_group = (pair_of_row >= first) & (pair_of_row < pair)
            yield first, pair, torch.nonzero_static(is_in_group, size=num_rows).squeeze(1)
            first, num_rows = pair, 0
        num_rows += count


def _pairs_between(
    batch: PairArguments, positions: Tensor, first: int, stop: int
) -> tuple[PairArguments, Tensor]:
    """Return pairs ``first`` to ``stop - 1`` as a batch, and the sequences of its ``positions``."""
    assert batch.sequence_ids is not None
    num_cells, num_pairs = batch.pair_shape
    ids = batch.sequence_ids[positions]
    group_ids = ids // num_pairs * (stop - first) + ids % num_pairs - first
    group = batch._replace(
        labels=batch.labels[positions],
        sequence_ids=group_ids,
        ref_logps=None if batch.ref_logps is None else batch.ref_logps[:, first:stop],
        pair_shape=[num_cells, stop - first],
    )
    return group, group_ids
