"""Gradients of token log-probabilities, tile by tile: the other half of ``reference.py``.

Logits are recomputed, so that nothing of the size of rows times vocabulary outlives a tile.
Letters as there.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, NamedTuple

import torch
from torch import Tensor

from realign_kernels.eager.reference import finite_shift, swap_at_
from realign_kernels.tiling import TileShape, spans

if TYPE_CHECKING:
    from realign_kernels.eager.reference import Rows
    from realign_kernels.head import Head, HeadTile
    from realign_kernels.options import LogitTransform
    from realign_kernels.vocabulary import VocabularyShard


class LogitGradient(NamedTuple):
    """The gradient with respect to x by row: ``spread * exp(x - shift)``, and two exceptions."""

    labels: Tensor
    at_label: Tensor  # replaces the entry of the label
    top_ids: Tensor | None
    at_top: Tensor | None  # is added to the entry of the top non-label token
    shift: Tensor
    spread: Tensor

    def block(self, rows: slice) -> LogitGradient:
        """Return the factors of some rows."""
        return LogitGradient(*(None if part is None else part[rows] for part in self))  # type: ignore[arg-type]

    def tile(self, x: Tensor, first_id: Tensor | int) -> Tensor:
        """Return the gradient with respect to a tile of x, (rows, columns)."""
        grad = x.sub(self.shift[:, None]).exp_().mul_(self.spread[:, None])
        swap_at_(grad, self.labels - first_id, self.at_label)
        if self.top_ids is not None and self.at_top is not None:
            columns = self.top_ids - first_id
            spread_at_top = swap_at_(grad, columns, self.at_top)
            swap_at_(grad, columns, spread_at_top + self.at_top)
        return grad


def factor_gradient(
    labels: Tensor,
    gap: Tensor,
    rest_max: Tensor,
    rest_sum: Tensor,
    top_ids: Tensor | None,
    grad_token_logps: Tensor,
    grad_top_logps: Tensor | None,
) -> LogitGradient:
    """Differentiate log p(label) and log p(top) by x: ``sum_k grad_k * (onehot_k - p)``."""
    grad_total = grad_token_logps if grad_top_logps is None else grad_token_logps + grad_top_logps
    rest_probs = torch.sigmoid(-gap)
    at_label = grad_token_logps * rest_probs
    if grad_top_logps is not None:
        at_label = at_label - grad_top_logps * torch.sigmoid(gap)
    # rest_sum is 0 only where no other column is finite; there exp(x - shift) is 0 as well.
    spread = -grad_total * (rest_probs / rest_sum).masked_fill(rest_sum == 0, 0.0)
    return LogitGradient(labels, at_label, top_ids, grad_top_logps, finite_shift(rest_max), spread)


class HeadGradients:
    """Gradients of the inputs that need one, None for the others.

    ``hidden`` has the N scored rows only and, like ``lora_a``, the accumulation dtype; ``weight``,
    ``bias`` and ``lora_b`` are summed in it tile by tile and have the dtype of their input.
    """

    def __init__(self, rows: Rows, head: Head, needed: tuple[bool, bool, bool, bool, bool]) -> None:
        needs_hidden, needs_weight, needs_bias, needs_lora_a, needs_lora_b = needed
        self.rows, self.head = rows, head
        self.hidden = self._zeros(head.weight.shape[1]) if needs_hidden else None
        self.weight = torch.empty_like(head.weight) if needs_weight else None
        self.bias = torch.empty_like(head.bias) if needs_bias and head.bias is not None else None
        self.lora_a = self.lora_b = self.low_rank = None
        if head.lora_a is not None and head.lora_b is not None:
            self.lora_a = torch.zeros_like(head.lora_a) if needs_lora_a else None
            self.lora_b = torch.empty_like(head.lora_b) if needs_lora_b else None
            # Of hidden @ A.T; both of its factors are reached through it.
            if needs_hidden or needs_lora_a:
                self.low_rank = self._zeros(head.lora_a.shape[0])

    def run(
        self,
        factors: LogitGradient,
        transform: LogitTransform,
        vocabulary: VocabularyShard,
        shape: TileShape,
    ) -> None:
        """Walk the vocabulary once, each of its tiles over every block of rows."""
        for columns in spans(vocabulary.size, shape.columns):
            tile = self.head.tile(columns)
            sums = _TileSums(tile, self)
            for block in spans(len(self.rows), shape.rows):
                hidden = self.rows.gather(block, self.head)
                low_rank = self.head.low_rank(hidden)
                x = transform.apply_(tile.logits(hidden, low_rank))
                grad_x = factors.block(block).tile(x, vocabulary.start + columns.start)
                grad_logits = transform.chain_(grad_x, x)
                if self.hidden is not None:
                    self.hidden[block].addmm_(grad_logits, tile.weight)
                if self.low_rank is not None and tile.lora_b is not None:
                    self.low_rank[block].addmm_(grad_logits, tile.lora_b)
                sums.add(grad_logits, hidden, low_rank)
            sums.store(self)
        self._finish(vocabulary, shape.rows)

    def _finish(self, vocabulary: VocabularyShard, block_rows: int) -> None:
        """Sum over ranks what every rank holds whole, then go back through the factor A."""
        for replicated in (self.hidden, self.low_rank):
            if replicated is not None:
                vocabulary.all_reduce_sum_(replicated)
        if self.low_rank is None or self.head.lora_a is None:
            return
        for block in spans(len(self.rows), block_rows):
            if self.hidden is not None:
                self.hidden[block].addmm_(self.low_rank[block], self.head.lora_a)
            if self.lora_a is not None:
                self.lora_a.addmm_(self.low_rank[block].T, self.rows.gather(block, self.head))

    def _zeros(self, width: int) -> Tensor:
        dtype = self.head.precision.accumulation
        return self.head.weight.new_zeros(len(self.rows), width, dtype=dtype)


class _TileSums:
    """Sums over rows of what one vocabulary tile owes to its weight, bias and factor B."""

    def __init__(self, tile: HeadTile, grads: HeadGradients) -> None:
        self.tile, self.scaling = tile, grads.head.lora_scaling
        self.weight = _zeros_if(tile.weight, grads.weight)
        self.bias = _zeros_if(tile.bias, grads.bias)
        self.lora_b = _zeros_if(tile.lora_b, grads.lora_b)

    def add(self, grad_logits: Tensor, hidden: Tensor, low_rank: Tensor | None) -> None:
        """Add a block of rows."""
        if self.weight is not None:
            self.weight.addmm_(grad_logits.T, hidden)
        if self.bias is not None:
            self.bias.add_(grad_logits.sum(dim=0))
        if self.lora_b is not None and low_rank is not None:
            self.lora_b.addmm_(grad_logits.T, low_rank, alpha=self.scaling)

    def store(self, grads: HeadGradients) -> None:
        """Round once, into the whole gradients."""
        for whole, part in (
            (grads.weight, self.weight),
            (grads.bias, self.bias),
            (grads.lora_b, self.lora_b),
        ):
            if whole is not None and part is not None:
                whole[self.tile.columns] = part


def _zeros_if(tile_part: Tensor | None, needed: Tensor | None) -> Tensor | None:
    return None if tile_part is None or needed is None else torch.zeros_like(tile_part)
