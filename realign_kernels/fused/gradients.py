"""Gradients of the fused backends: from what the forward kept to the inputs.

The gradient by the raw logits of a row is ``scale * E``, with exact entries at the label and the
top token, where E holds 0.  Letters as in ``fused.py``.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, NamedTuple

import torch
from torch import Tensor

from realign_kernels.backends.kernel_set import RowState, Tile
from realign_kernels.fused.forward import FusedCall, Rows, add_weight_rows, logits_into
from realign_kernels.fused.products import addmm_into, mm_into
from realign_kernels.tiling import spans

if TYPE_CHECKING:
    from realign_kernels.fused.scores import LogitGradient, RowNumbers
    from realign_kernels.head import Head, HeadTile


class Needed(NamedTuple):
    """Which inputs need a gradient."""

    hidden: bool
    weight: bool
    bias: bool
    lora_a: bool
    lora_b: bool


class Gradients(NamedTuple):
    """Gradients of the inputs that need one; ``hidden`` has the gathered rows only."""

    hidden: Tensor | None  # (rows, D), accumulation dtype
    weight: Tensor | None  # (V, D), dtype of the weight, like those below
    bias: Tensor | None
    lora_a: Tensor | None
    lora_b: Tensor | None


def hidden_gradient(
    call: FusedCall,
    rows: Rows,
    gradient: LogitGradient,
    top_ids: Tensor | None,
    accumulator: Tensor,
    low_rank_accumulator: Tensor | None,
) -> tuple[Tensor, Tensor | None]:
    """Turn ``E @ W`` into the gradient by hidden states, ``E @ B`` into that by ``hidden @ A.T``.

    Both accumulators are overwritten; rows beyond those of ``gradient`` are cut off.
    """
    num_rows = len(gradient.scale)
    add_weight_rows(
        call, accumulator, low_rank_accumulator, gradient.scale, rows.ids[:num_rows],
        gradient.at_label,
    )  # fmt: skip
    if gradient.at_top is not None and top_ids is not None:
        ones = torch.ones_like(gradient.scale)
        add_weight_rows(
            call, accumulator, low_rank_accumulator, ones, top_ids[:num_rows], gradient.at_top
        )
    call.vocabulary.all_reduce_sum_(accumulator)
    if low_rank_accumulator is None or call.head.lora_a is None:
        return accumulator[:num_rows], None
    call.vocabulary.all_reduce_sum_(low_rank_accumulator)
    for block in spans(len(accumulator), call.shape.rows):
        accumulator[block].addmm_(low_rank_accumulator[block], call.head.lora_a)
    return accumulator[:num_rows], low_rank_accumulator[:num_rows]


def head_gradients(
    call: FusedCall,
    rows: Rows,
    numbers: RowNumbers,
    gradient: LogitGradient,
    stash: Tensor | None,
    needed: Needed,
    onto: Gradients | None = None,
) -> Gradients:
    """Walk the vocabulary once more, over E as stashed or computed anew.

    ``onto`` holds gradients of the head, in the accumulation dtype, that these are added to.
    """
    sums = _Sums(call, rows, gradient, numbers.top_ids, needed, onto)
    exponentials = _Stashed(stash) if stash is not None else _Replayed(call, rows, numbers)
    for columns in spans(call.vocabulary.size, call.shape.columns):
        tile = call.head.tile(columns)
        sums.begin(columns)
        for block in spans(len(gradient.scale), exponentials.block_rows(call)):
            sums.add(block, exponentials.get(block, columns, tile), tile)
        sums.end(columns)
        del tile  # or two casts of the head would be alive at once
    return sums.finish()


class _Stashed:
    """E as the forward kept it."""

    def __init__(self, stash: Tensor) -> None:
        self.stash = stash

    def block_rows(self, call: FusedCall) -> int:
        # No scratch is needed, so that one product takes all rows.
        return max(1, len(self.stash))

    def get(self, block: slice, columns: slice, tile: HeadTile) -> Tensor:
        return self.stash[block, columns]


class _Replayed:
    """E of one tile at a time, from logits computed again."""

    def __init__(self, call: FusedCall, rows: Rows, numbers: RowNumbers) -> None:
        self.call, self.rows = call, rows
        self.state = RowState(
            shift=numbers.shift,
            rest_sum=numbers.rest_sum,
            top_logits=numbers.top_logits,
            top_ids=numbers.top_ids,
        )
        height = min(call.shape.rows, len(numbers.shift))
        width = min(call.shape.columns, call.vocabulary.size)
        self.logits = rows.hidden.new_empty(height * width, dtype=call.accumulation)
        self.exponentials = self.logits
        if call.operand != call.accumulation:
            self.exponentials = rows.hidden.new_empty(height * width, dtype=call.operand)

    def block_rows(self, call: FusedCall) -> int:
        return call.shape.rows

    def get(self, block: slice, columns: slice, tile: HeadTile) -> Tensor:
        shape = block.stop - block.start, columns.stop - columns.start
        logits, exponentials = (
            buffer[: shape[0] * shape[1]].view(shape) for buffer in (self.logits, self.exponentials)
        )
        logits_into(logits, self.rows, block, tile)
        self.call.kernels.epilogue(
            Tile(
                logits=logits,
                exponentials=exponentials,
                first_column=columns.start,
                bias=None if tile.bias is None else tile.bias.contiguous(),
                labels=self.rows.ids[block],
                transform=self.call.transform,
                bound=torch.inf,
                state=self.state.view(block),
                replays=True,
            )
        )
        return exponentials


class _Sums:
    """Gradients as tiles of E are added."""

    def __init__(
        self,
        call: FusedCall,
        rows: Rows,
        gradient: LogitGradient,
        top_ids: Tensor | None,
        needed: Needed,
        onto: Gradients | None,
    ) -> None:
        self.call, self.rows, self.gradient, self.top_ids = call, rows, gradient, top_ids
        self.onto = onto
        head, num_rows = call.head, len(gradient.scale)
        has_low_rank = head.lora_a is not None
        self.needed = needed
        new = rows.hidden.new_zeros
        # Rows are scaled before the products over rows, after those over columns.
        scale = gradient.scale[:, None]
        self.scaled_hidden = self.scaled_low_rank = None
        if needed.weight:
            self.scaled_hidden = (rows.hidden[:num_rows] * scale).to(call.operand)
        if needed.lora_b and rows.low_rank is not None:
            self.scaled_low_rank = rows.low_rank[:num_rows] * scale * head.lora_scaling
        # What the entries of labels are made of; a copy on GPUs alone, whose operands are half.
        self.wide_hidden = rows.hidden.to(call.accumulation) if needed.weight else rows.hidden
        self.accumulator = self.low_rank_accumulator = None
        if needed.hidden or (has_low_rank and needed.lora_a):
            shape = len(rows.hidden), head.weight.shape[1]  # with the empty rows, as in the forward
            self.accumulator = new(shape, dtype=call.accumulation)
            if head.lora_a is not None:
                self.low_rank_accumulator = new(shape[0], len(head.lora_a), dtype=call.accumulation)
        self.entries = _Entries(call, rows.ids[:num_rows], gradient, top_ids)
        self.weight, self.bias, self.lora_b = _new_gradients(head, needed)
        if onto is not None:
            self.weight, self.bias, self.lora_b = onto.weight, onto.bias, onto.lora_b

    def begin(self, columns: slice) -> None:
        """Start the parts of a range of the vocabulary."""
        self.weight_tile = self._tile(self.weight, columns)
        self.bias_tile = self._tile(None if self.bias is None else self.bias[:, None], columns)
        self.lora_b_tile = self._tile(self.lora_b, columns)
        self.is_first = self.onto is None

    def _tile(self, whole: Tensor | None, columns: slice) -> Tensor | None:
        if whole is None:
            return None
        part = whole[columns]
        if part.dtype == self.call.accumulation and part.stride(1) == 1:
            return part
        return torch.empty(part.shape, dtype=self.call.accumulation, device=part.device)

    def add(self, block: slice, exponentials: Tensor, tile: HeadTile) -> None:
        """Add some rows of a tile."""
        if self.accumulator is not None:
            addmm_into(self.accumulator[block], exponentials, tile.weight)
        if self.low_rank_accumulator is not None and tile.lora_b is not None:
            wide = exponentials.to(tile.lora_b.dtype)
            self.low_rank_accumulator[block].addmm_(wide, tile.lora_b)
        into = mm_into if self.is_first else addmm_into
        if self.weight_tile is not None and self.scaled_hidden is not None:
            into(self.weight_tile, exponentials.T, self.scaled_hidden[block])
        if self.bias_tile is not None:
            scale = self.gradient.scale[block, None].to(exponentials.dtype)
            into(self.bias_tile, exponentials.T, scale)
        if self.lora_b_tile is not None and self.scaled_low_rank is not None:
            into(
                self.lora_b_tile,
                exponentials.T.to(self.call.accumulation),
                self.scaled_low_rank[block],
            )
        self.is_first = False

    def end(self, columns: slice) -> None:
        """Add the entries of labels and top tokens, then round once."""
        hidden, low_rank = self.wide_hidden, self.rows.low_rank
        num_rows = len(self.gradient.scale)
        ones = self.gradient.scale.new_ones(num_rows, 1)
        for whole, part, factor in (
            (self.weight, self.weight_tile, hidden),
            (None if self.bias is None else self.bias[:, None], self.bias_tile, ones),
            (
                self.lora_b,
                self.lora_b_tile,
                None if low_rank is None else low_rank * self.call.head.lora_scaling,
            ),
        ):
            if whole is None or part is None or factor is None:
                continue
            if self.is_first:
                part.zero_()
            self.entries.add(part, columns, factor[:num_rows])
            if part.data_ptr() != whole[columns].data_ptr():
                whole[columns] = part
        self.weight_tile = self.bias_tile = self.lora_b_tile = part = None

    def finish(self) -> Gradients:
        """Go from the low-rank product back to its factor, and return everything."""
        hidden = low_rank = lora_a = None
        if self.accumulator is not None:
            hidden, low_rank = hidden_gradient(
                self.call, self.rows, self.gradient, self.top_ids, self.accumulator,
                self.low_rank_accumulator,
            )  # fmt: skip
        if self.needed.lora_a and low_rank is not None:
            lora_a = low_rank.T @ self.rows.hidden[: len(low_rank)].to(low_rank.dtype)
        return Gradients(
            hidden if self.needed.hidden else None, self.weight, self.bias, lora_a, self.lora_b
        )


def _new_gradients(
    head: Head, needed: Needed
) -> tuple[Tensor | None, Tensor | None, Tensor | None]:
    """Return room for the gradients of weight, bias and B."""
    tensors = (head.weight, head.bias, head.lora_b)
    is_needed = (needed.weight, needed.bias, needed.lora_b)
    weight, bias, lora_b = (
        torch.empty_like(tensor, memory_format=torch.contiguous_format)
        if needs and tensor is not None
        else None
        for tensor, needs in zip(tensors, is_needed, strict=True)
    )
    return weight, bias, lora_b


class _Entries:
    """The exact entries of the gradient by logits, sorted by token."""

    def __init__(
        self, call: FusedCall, label_ids: Tensor, gradient: LogitGradient, top_ids: Tensor | None
    ) -> None:
        self.call = call
        ids, self.coefficients = label_ids, gradient.at_label
        if gradient.at_top is not None and top_ids is not None:
            ids = torch.cat([ids, top_ids[: len(label_ids)]])
            self.coefficients = torch.cat([gradient.at_label, gradient.at_top])
        size = call.vocabulary.size
        is_here = (ids >= 0) & (ids < size)
        ids, self.order = torch.where(is_here, ids, size).sort(stable=True)
        self.starts = torch.searchsorted(ids, torch.arange(size + 1, device=ids.device))

    def add(self, part: Tensor, columns: slice, rows: Tensor) -> None:
        """Add ``coefficient * row`` to the row of its token."""
        starts = self.starts[columns.start : columns.stop + 1]
        self.call.kernels.add_entries(part, starts, self.order, self.coefficients, rows)
