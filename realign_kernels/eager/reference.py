"""Token log-probabilities in plain PyTorch, tile by tile: what every fused kernel must equal.

With ``x`` the transformed logits and y the label, one pass over the *other* columns is enough:

    gap = x[y] - logsumexp(x[v != y])
    log p(y) = logsigmoid(gap)
    p(v) = sigmoid(-gap) * softmax(x[v != y])

Leaving the label out keeps full relative accuracy where p(y) is close to 1, in the value (which is
a tiny negative number there) and in the gradient (which is 1 - p(y)).  Knows no autograd and no
arguments of users.

Letters: **N** answer tokens, **D** hidden size, **V** vocabulary (of this shard), **r** rank.
"""

from __future__ import annotations

from dataclasses import dataclass, fields
from typing import TYPE_CHECKING, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from realign_kernels.tiling import TileShape, spans

if TYPE_CHECKING:
    from realign_kernels.head import Head
    from realign_kernels.options import LogitTransform
    from realign_kernels.vocabulary import VocabularyShard

_INF = float("inf")
# Stands for "no such token" while ids are reduced by minimum; becomes NO_TOKEN in results.
_PAST_ANY_TOKEN = torch.iinfo(torch.int64).max
NO_TOKEN = -1


@dataclass(frozen=True, slots=True)
class Rows:
    """The hidden states that carry a label, gathered a tile at a time."""

    hidden_states: Tensor  # (..., D)
    positions: tuple[Tensor, ...]  # (N,) indices into each leading dimension
    labels: Tensor  # (N,) global token ids

    def __len__(self) -> int:
        return self.labels.shape[0]

    def gather(self, rows: slice, head: Head) -> Tensor:
        """Return the upcast hidden states of some rows, (rows, D)."""
        return head.precision.of_operand(
            self.hidden_states[tuple(index[rows] for index in self.positions)]
        )


@dataclass(slots=True)
class RowSums:
    """What the pass over the vocabulary accumulates; ``rest`` is every column but the label's.

    Exponentials are relative to ``rest_max``.  The last four are None unless statistics are asked
    for.
    """

    label_logits: Tensor
    rest_max: Tensor
    rest_sum: Tensor  # of e = exp(x - rest_max)
    rest_entr: Tensor | None = None  # of -e * log(e)
    rest_square_sum: Tensor | None = None  # of e ** 2
    logit_sum: Tensor | None = None  # of x, label included
    top_ids: Tensor | None = None  # lowest global id at which rest_max is reached

    @classmethod
    def start(
        cls, labels: Tensor, vocabulary: VocabularyShard, dtype: torch.dtype, *, statistics: bool
    ) -> RowSums:
        """Return the sums over no columns."""
        zeros = torch.zeros_like(labels, dtype=dtype)
        sums = cls(zeros, torch.full_like(zeros, -_INF), torch.zeros_like(zeros))
        if statistics:
            sums.rest_entr = torch.zeros_like(zeros)
            sums.rest_square_sum = torch.zeros_like(zeros)
            sums.logit_sum = torch.zeros_like(zeros)
            # The lowest id that is not the label, right even if every logit is -inf.
            first = torch.where(labels == vocabulary.start, labels + 1, vocabulary.start)
            sums.top_ids = torch.where(
                first < vocabulary.start + vocabulary.size, first, _PAST_ANY_TOKEN
            )
        return sums

    def view(self, rows: slice) -> RowSums:
        """Return the entries of some rows; updates go through to these."""
        values = (getattr(self, field.name) for field in fields(self))
        parts = [None if value is None else value[rows] for value in values]
        return RowSums(*parts)  # type: ignore[arg-type]

    def add_tile(self, x: Tensor, labels: Tensor, first_id: Tensor | int) -> None:
        """Fold in a tile of x, (rows, columns), of which ``first_id`` is first; overwrites x."""
        if self.logit_sum is not None:
            self.logit_sum.add_(x.sum(dim=1))
        self.label_logits.add_(
            swap_at_(x, labels - first_id, torch.full_like(self.rest_max, -_INF))
        )
        tile_max = x.amax(dim=1)
        if self.top_ids is not None:
            # argmax returns the first of equals, and only a larger value replaces an earlier
            # tile's.
            self.top_ids.copy_(
                torch.where(tile_max > self.rest_max, first_id + x.argmax(dim=1), self.top_ids)
            )
        shift = self.rescale_(torch.maximum(self.rest_max, tile_max))
        exponentials = x.sub_(shift[:, None]).exp_()
        self.rest_sum.add_(exponentials.sum(dim=1))
        if self.rest_entr is not None and self.rest_square_sum is not None:
            self.rest_entr.add_(torch.special.entr(exponentials).sum(dim=1))
            self.rest_square_sum.add_(exponentials.square_().sum(dim=1))

    def rescale_(self, new_max: Tensor) -> Tensor:
        """Make every sum relative to a larger maximum; return the shift that goes with it."""
        shift = finite_shift(new_max)
        decay = torch.exp(self.rest_max - shift)
        if self.rest_entr is not None and self.rest_square_sum is not None:
            # -(a * e) * log(a * e) = a * entr(e) + entr(a) * e
            self.rest_entr.mul_(decay).add_(torch.special.entr(decay) * self.rest_sum)
            self.rest_square_sum.mul_(decay.square())
        self.rest_sum.mul_(decay)
        self.rest_max.copy_(new_max)
        return shift

    def reduce_over(self, vocabulary: VocabularyShard) -> None:
        """Merge the shards of every rank: one MAX, one SUM and, for statistics, one MIN of ids."""
        if vocabulary.group is None:
            return
        shard_max = self.rest_max.clone()
        self.rescale_(vocabulary.all_reduce_max_(shard_max.clone()))
        if self.top_ids is not None:
            is_top = shard_max == self.rest_max
            self.top_ids.copy_(torch.where(is_top, self.top_ids, _PAST_ANY_TOKEN))
            vocabulary.all_reduce_min_(self.top_ids)
        summed = (
            self.label_logits,
            self.rest_sum,
            self.rest_entr,
            self.rest_square_sum,
            self.logit_sum,
        )
        parts = [part for part in summed if part is not None]
        for part, total in zip(parts, vocabulary.all_reduce_sum_(torch.stack(parts)), strict=True):
            part.copy_(total)


class RowScores(NamedTuple):
    """Results of the forward; the last six are None unless statistics are asked for."""

    token_logps: Tensor
    top_non_label_logps: Tensor | None = None
    entropy: Tensor | None = None
    log_sum_sq_probs: Tensor | None = None
    mean_logits: Tensor | None = None
    is_top1: Tensor | None = None
    top_non_label_ids: Tensor | None = None


def sum_rows(
    rows: Rows,
    head: Head,
    transform: LogitTransform,
    vocabulary: VocabularyShard,
    shape: TileShape,
    *,
    statistics: bool,
) -> RowSums:
    """Walk the vocabulary once for each block of rows."""
    sums = RowSums.start(
        rows.labels, vocabulary, head.precision.accumulation, statistics=statistics
    )
    for block in spans(len(rows), shape.rows):
        hidden = rows.gather(block, head)
        low_rank = head.low_rank(hidden)
        block_sums = sums.view(block)
        for columns in spans(vocabulary.size, shape.columns):
            x = transform.apply_(head.tile(columns).logits(hidden, low_rank))
            block_sums.add_tile(x, rows.labels[block], vocabulary.start + columns.start)
    sums.reduce_over(vocabulary)
    return sums


def label_gap(sums: RowSums, labels: Tensor, vocabulary: VocabularyShard) -> Tensor:
    """Return the log-odds of the label; NaN for a label past V or a logit that overflowed."""
    is_defined = (labels >= 0) & (labels < vocabulary.total) & (sums.label_logits != _INF)
    # The difference first: both are large where the logits are, and their difference is then exact.
    gap = (sums.label_logits - sums.rest_max) - torch.log(sums.rest_sum).masked_fill(
        sums.rest_max == -_INF, 0.0
    )
    return torch.where(is_defined, gap, float("nan"))


def score_rows(
    sums: RowSums, gap: Tensor, labels: Tensor, vocabulary: VocabularyShard
) -> RowScores:
    """Turn sums into log-probabilities and, where they were accumulated, statistics."""
    token_logps = F.logsigmoid(gap)
    if (
        sums.rest_entr is None
        or sums.rest_square_sum is None
        or sums.logit_sum is None
        or sums.top_ids is None
    ):
        return RowScores(token_logps)
    rest_logps = F.logsigmoid(-gap)
    has_rest = sums.rest_max > -_INF
    # Where nothing but the label has a finite logit, the rest has probability 0 and no entropy.
    log_sum = torch.log(sums.rest_sum).masked_fill(~has_rest, 0.0)
    rest_entropy = log_sum + (sums.rest_entr / sums.rest_sum).masked_fill(~has_rest, 0.0)
    top_logps = rest_logps - log_sum
    is_strict_top = sums.label_logits > sums.rest_max
    is_first_of_equals = (sums.label_logits == sums.rest_max) & (labels < sums.top_ids)
    return RowScores(
        token_logps,
        top_non_label_logps=top_logps,
        entropy=_minus_p_log_p(token_logps)
        + _minus_p_log_p(rest_logps)
        + torch.exp(rest_logps) * rest_entropy,
        log_sum_sq_probs=torch.logaddexp(
            2 * token_logps, 2 * top_logps + torch.log(sums.rest_square_sum)
        ),
        mean_logits=sums.logit_sum / vocabulary.total,
        is_top1=is_strict_top | is_first_of_equals,
        top_non_label_ids=torch.where(sums.top_ids == _PAST_ANY_TOKEN, NO_TOKEN, sums.top_ids),
    )


def swap_at_(tile: Tensor, columns: Tensor, values: Tensor) -> Tensor:
    """Swap ``values`` with ``tile[n, columns[n]]``; rows whose column is outside get 0."""
    is_inside = (columns >= 0) & (columns < tile.shape[1])
    index = columns.clamp(0, tile.shape[1] - 1)[:, None]
    old = tile.gather(1, index).squeeze(1)
    tile.scatter_(1, index, torch.where(is_inside, values, old)[:, None])
    return torch.where(is_inside, old, 0.0)


def finite_shift(row_max: Tensor) -> Tensor:
    """Return what to subtract before exp: the maximum, or 0 where it is -inf."""
    return row_max.masked_fill(row_max == -_INF, 0.0)


def _minus_p_log_p(log_p: Tensor) -> Tensor:
    return (-log_p * torch.exp(log_p)).masked_fill(log_p == -_INF, 0.0)
