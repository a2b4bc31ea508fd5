"""The forward: one pass over the vocabulary, relative to the label.

With x the transformed logits, y the label and phi = dx/dz, every tile adds

    e = exp(x - shift), 0 at y        s += sum(e)        E = e * phi        A += E @ W

where ``shift`` is ``x[y]`` itself, so that ``log p(y) = -log1p(s)`` and the derivative of log p(y)
in the hidden state is ``(s * phi[y] * W[y] - A) / (1 + s)``: tiles add up in any order, and the
value keeps its relative accuracy where p(y) is close to 1.  Where some x lies so far above the
label that exp could overflow, the kernels move that row's shift and rescale what has been summed;
the 1 of both formulas becomes ``t = exp(x[y] - shift)``.  If the most probable other token ("top")
is scored too, it is left out of s and A like the label.

Tiles, dtypes, products and kernels are those of a kernel set. This module does not use autograd.
Letters: **N** answer tokens, **D** hidden size, **V** vocabulary of this shard, **r** rank.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from enum import Enum
from typing import TYPE_CHECKING, NamedTuple

import torch
from torch import Tensor

from realign_kernels.backends.kernel_set import (
    KernelSet,
    ProductKernels,
    RowKernels,
    RowState,
    StartedRows,
    Tile,
)
from realign_kernels.fused.group import reduce_over_group
from realign_kernels.head import PARTS_OF_ROWS, split
from realign_kernels.tiling import TileShape, padded_rows, row_stride, spans, with_stride

if TYPE_CHECKING:
    from realign_kernels.head import Head, HeadTile, LogitTransform
    from realign_kernels.vocabulary import VocabularyShard

_INF = float("inf")
NO_TOKEN = -1

# How far a logit may lie above the shift, in nats: V * exp(bound) * |W| must not overflow the
# operand of the second product.  With statistics the squares must not overflow either.
_BOUNDS = {torch.float16: 8.0, torch.bfloat16: 60.0, torch.float32: 60.0, torch.float64: 600.0}


class Keeps(Enum):
    """The part of a forward that is kept for the backward."""

    NOTHING = "nothing"
    SLOPES = "slopes"  # the derivative in the hidden states, which follows from A
    STASH = "stash"  # E of every tile
    NUMBERS = "numbers"  # enough of every row to compute E again
    STASH_IF_IT_FITS = "stash if it fits"  # or else NUMBERS; the number of rows decides


@dataclass(frozen=True, slots=True)
class FusedCall:
    """Settings that the forward and the backward of one call share."""

    head: Head
    transform: LogitTransform
    vocabulary: VocabularyShard
    shape: TileShape
    kernels: KernelSet
    accumulates_exactly: bool = False

    @property
    def accumulation(self) -> torch.dtype:
        """The dtype of logits, sums and gradients while they are summed."""
        return self.head.precision.accumulation

    @property
    def stash_width(self) -> int:
        """Elements of a row of the stash: the vocabulary, and padding that aligns the next row."""
        return row_stride(self.vocabulary.size, getattr(self.kernels, "STRIDE_MULTIPLE", 1))

    @property
    def stride_multiple(self) -> int:
        """Divisor of the stride of a tile's rows, in elements; 1 for small tiles."""
        multiple: int = getattr(self.kernels, "STRIDE_MULTIPLE", 1)
        return multiple if min(self.shape.columns, self.vocabulary.size) >= multiple else 1

    @property
    def operand(self) -> torch.dtype:
        """The dtype of hidden states and weight in products."""
        return self.head.precision.operand

    @property
    def row_kernels(self) -> RowKernels | None:
        """The kernels for work that is done once per call, or None where this head has none."""
        if self.head.lora_a is not None or self.vocabulary.group is not None:
            return None
        row_kernels: RowKernels | None = getattr(self.kernels, "ROW_KERNELS", None)
        return row_kernels

    @property
    def product_kernels(self) -> ProductKernels | None:
        """The kernels of products, if they are faster than a BLAS or exact sums were asked for."""
        kernels: ProductKernels | None = getattr(self.kernels, "PRODUCT_KERNELS", None)
        if kernels is None or self.accumulation != torch.float32:
            return None
        # Sums of float32 products are not truncated, unless TF32 is enabled.
        is_wanted = self.accumulates_exactly and self.operand != torch.float32
        return (
            kernels
            if is_wanted or kernels.is_faster(self.operand, self.head.weight.device)
            else None
        )

    @property
    def exponential(self) -> torch.dtype:
        """The dtype of exponentials in products."""
        return self.head.precision.exponential

    def totals(self, rest_sum: Tensor) -> Tensor:
        """Return an upper bound on the sum of the entries of E in each row."""
        return rest_sum * (self.transform.logit_scale / self.transform.temperature)


class Rows(NamedTuple):
    """The rows that carry a label, gathered; a few empty ones may follow."""

    hidden: Tensor  # (rows, D), in the dtype of products
    low_rank: Tensor | None  # (rows, r), hidden @ A.T
    low_rank_parts: Tensor | None  # (rows, 6r): PARTS_OF_ROWS, side by side
    ids: Tensor  # (rows,), label in this shard's numbering


class PassStart(NamedTuple):
    """Rows with the logits of their labels, before the first tile."""

    rows: Rows
    label_logits: Tensor  # (rows,), x[y]
    state: RowState
    started: StartedRows | None  # the output of the kernel, if one has started the rows


class PassResult(NamedTuple):
    """Results of one pass over the vocabulary."""

    label_logits: Tensor  # (rows,), x[y]
    state: RowState
    accumulator: Tensor | None  # (rows, D), E @ W
    low_rank_accumulator: Tensor | None  # (rows, r)
    stash: Tensor | None  # (rows, stash_width), E; zeros past the vocabulary


def gather_rows(call: FusedCall, hidden_states: Tensor, labels: Tensor, positions: Tensor) -> Rows:
    """Gather the rows at ``positions`` of ``labels`` (M,) and of ``hidden_states`` (..., D)."""
    num_rows = positions.shape[0]
    total = padded_rows(num_rows, call.shape)
    if call.row_kernels is not None:
        started = call.row_kernels.start_rows(
            call.head, call.transform, hidden_states, labels, positions, total, with_numbers=False
        )
        return Rows(started.hidden, None, None, started.ids)
    precision = call.head.precision
    hidden_size = hidden_states.shape[-1]
    # An empty tensor counts as contiguous whatever its strides, so it is not taken as it is.
    if total == num_rows == len(labels) > 0:
        hidden = precision.of_operand(hidden_states).reshape(-1, hidden_size).contiguous()
    else:
        # Indexed in their own shape: flattening a slice of a batch would copy all of it.
        hidden = hidden_states.new_zeros(total, hidden_size, dtype=call.operand)
        for block in spans(num_rows, call.shape.rows):
            index = _unravelled(positions[block], hidden_states.shape[:-1])
            hidden[block] = precision.of_operand(hidden_states[index])
    ids = torch.full((total,), NO_TOKEN, dtype=torch.int64, device=labels.device)
    torch.sub(labels[positions], call.vocabulary.start, out=ids[:num_rows])
    low_rank = None
    if call.head.lora_a is not None:
        low_rank = hidden.new_empty(total, len(call.head.lora_a), dtype=call.accumulation)
        for block in spans(total, call.shape.rows):
            wide = hidden[block].to(call.accumulation)
            call.kernels.product(low_rank[block], wide, call.head.lora_a.T, adds=False)
    low_rank_parts = None
    if low_rank is not None and precision.splits_factors:
        parts = split(low_rank, 3)
        low_rank_parts = torch.cat([parts[i] for i in PARTS_OF_ROWS], dim=1)
    return Rows(hidden, low_rank, low_rank_parts, ids)


def _unravelled(positions: Tensor, shape: torch.Size) -> tuple[Tensor, ...]:
    """Return flat positions as an index of a shape, one tensor per dimension.

    ``torch.unravel_index`` copies the shape to the device and waits for it.
    """
    index = []
    for size in reversed(shape):
        index.append(positions % size)
        positions = positions // size
    return tuple(reversed(index))


def start_pass(
    call: FusedCall,
    hidden_states: Tensor,
    labels: Tensor,
    positions: Tensor,
    keeps: Keeps,
    *,
    with_statistics: bool,
    tracks_top: bool,
) -> PassStart:
    """Gather rows as :func:`gather_rows` does, and start their sums."""
    # In float16 exponentials far below 1 would be lost, so there the first tile sets the shift.
    starts_low = call.operand == torch.float16
    started = None
    if call.row_kernels is not None:
        total = padded_rows(len(positions), call.shape)
        started = call.row_kernels.start_rows(
            call.head, call.transform, hidden_states, labels, positions, total, with_numbers=True
        )
        rows = Rows(started.hidden, None, None, started.ids)
        label_logits, shift, rest_sum = started.numbers.unbind()
        if not (with_statistics or tracks_top):
            return PassStart(rows, label_logits, RowState(shift, rest_sum), started)
    else:
        rows = gather_rows(call, hidden_states, labels, positions)
        label_logits = _label_logits(call, rows)
        shift = torch.full_like(label_logits, -_INF) if starts_low else label_logits.clone()
    state = start_rows(
        shift,
        statistics=with_statistics,
        tracks_top=tracks_top,
        releases=tracks_top and keeps is Keeps.SLOPES,
    )
    return PassStart(rows, label_logits, state, started)


def walk_vocabulary(
    call: FusedCall, start: PassStart, keeps: Keeps, *, with_statistics: bool
) -> PassResult:
    """Go over the vocabulary once, then merge the sums over the group."""
    vocabulary, head = call.vocabulary, call.head
    rows, label_logits, state, _ = start
    scratch = _Scratch(call, rows, keeps)
    for columns in spans(vocabulary.size, call.shape.columns):
        head_tile = head.tile(columns)
        for block in spans(len(rows.ids), call.shape.rows):
            tile = scratch.tile(block, columns, head_tile, state, halve_bound=with_statistics)
            fold_tile(call, tile, rows, block, head_tile)
            scratch.accumulate(block, tile, head_tile)
        del head_tile  # or two casts of the head would be in memory at once
    scratch.restore_moved_rows(state.shift)
    if vocabulary.group is not None:
        reduce_over_group(vocabulary, call.transform, state, scratch.move_shifts, scratch.add_back)
    if scratch.stash is not None and state.top_ids is not None:
        _drop_entries(scratch.stash, state.top_ids)
    return PassResult(
        label_logits, state, scratch.accumulator, scratch.low_rank_accumulator, scratch.whole_stash
    )


def start_rows(shift: Tensor, *, statistics: bool, tracks_top: bool, releases: bool) -> RowState:
    """Return the sums as they are before the first tile."""

    def filled(value: float, is_used: bool) -> Tensor | None:
        return torch.full_like(shift, value) if is_used else None

    def no_tokens(is_used: bool) -> Tensor | None:
        return torch.full_like(shift, NO_TOKEN, dtype=torch.int64) if is_used else None

    return RowState(
        shift=shift,
        rest_sum=torch.zeros_like(shift),
        logit_sum=filled(0.0, statistics),
        label_logits=filled(-_INF, statistics),
        rest_entropy_sum=filled(0.0, statistics),
        rest_square_sum=filled(0.0, statistics),
        top_logits=filled(-_INF, tracks_top),
        top_ids=no_tokens(tracks_top),
        released_ids=no_tokens(releases),
        released_values=filled(0.0, releases),
    )


def view_rows(state: RowState, block: slice) -> RowState:
    """Return views of the entries of some rows."""
    if block.stop - block.start == len(state.shift):
        return state
    return RowState(*(None if part is None else part[block] for part in state))  # type: ignore[arg-type]


def fold_tile(call: FusedCall, tile: Tile, rows: Rows, block: slice, head_tile: HeadTile) -> None:
    """Compute the logits of a tile and fold them into the sums of its rows."""
    kernels = call.product_kernels
    if kernels is not None and _has_fused_product(call, tile, head_tile):
        low_rank = _low_rank_operands(call, rows, block, head_tile)
        kernels.fused_product(tile, rows.hidden[block], head_tile.weight, low_rank)
    else:
        logits_into(call, tile.logits, rows, block, head_tile)
        call.kernels.epilogue(tile)


def logits_into(call: FusedCall, out: Tensor, rows: Rows, block: slice, tile: HeadTile) -> None:
    """Set ``out`` to the raw logits of a tile, except the bias, which the epilogue adds."""
    kernels, low_rank = call.product_kernels, _low_rank_operands(call, rows, block, tile)
    if kernels is not None:
        is_operand = low_rank is None or low_rank[0].dtype == call.operand
        kernels.exact_product(
            out, rows.hidden[block], tile.weight, low_rank if is_operand else None
        )
        if is_operand:
            return
    else:
        call.kernels.product(out, rows.hidden[block], tile.weight.T, adds=False)
    if low_rank is not None:
        call.kernels.product(out, low_rank[0], low_rank[1].T, adds=True)


def _low_rank_operands(
    call: FusedCall, rows: Rows, block: slice, tile: HeadTile
) -> tuple[Tensor, Tensor] | None:
    """Return the factors of the low-rank part of logits, (rows, K) and (columns, K)."""
    if rows.low_rank_parts is not None and tile.lora_b_parts is not None:
        return rows.low_rank_parts[block], tile.lora_b_parts
    if rows.low_rank is not None and tile.lora_b is not None:
        return rows.low_rank[block], tile.lora_b
    return None


def _has_fused_product(call: FusedCall, tile: Tile, head_tile: HeadTile) -> bool:
    """Return whether the kernels of products can replace the epilogue of a tile."""
    has_statistics, tracks_top = (
        part is not None for part in (tile.state.rest_entropy_sum, tile.state.top_ids)
    )
    is_summed = has_statistics or (tracks_top and not tile.replays)
    factor = head_tile.lora_b if head_tile.lora_b_parts is None else head_tile.lora_b_parts
    return (factor is None or factor.dtype == call.operand) and not is_summed


def add_by_lora(
    call: FusedCall,
    accumulator: Tensor,
    exponentials: Tensor,
    tile: HeadTile,
    *,
    adds: bool = True,
) -> None:
    """Set the accumulator to ``E @ B`` of a tile, or add that to it."""
    assert tile.lora_b is not None
    if tile.lora_b_parts is None:
        wide = exponentials.to(accumulator.dtype)
        call.kernels.product(accumulator, wide, tile.lora_b, adds=adds)
    else:
        # E is bfloat16 itself, so two parts have digits enough.
        parts = tile.lora_b_parts[:, : 2 * tile.lora_b.shape[1]]
        multiply_parts(call, accumulator, exponentials, parts, adds=adds)


def multiply_parts(call: FusedCall, out: Tensor, a: Tensor, parts: Tensor, *, adds: bool) -> None:
    """Set ``out`` to ``a @ (high + low)``, or add that; ``parts`` holds the two side by side."""
    products = out.new_empty(out.shape[0], parts.shape[1])
    call.kernels.product(products, a, parts, adds=False)
    high, low = products.chunk(2, dim=1)
    if adds:
        out.add_(high).add_(low)
    else:
        torch.add(high, low, out=out)


def add_by_weight(
    call: FusedCall,
    accumulator: Tensor,
    exponentials: Tensor,
    weight: Tensor,
    rest_sum: Tensor,
    *,
    adds: bool = True,
) -> None:
    """Set the accumulator to ``E @ W`` of a tile, or add that to it."""
    if call.exponential == call.operand:
        call.kernels.product(accumulator, exponentials, weight, adds=adds)
    else:
        totals = call.totals(rest_sum)
        call.kernels.exponential_product(accumulator, exponentials, weight, totals, adds=adds)


def add_weight_rows(
    call: FusedCall,
    accumulator: Tensor,
    low_rank_accumulator: Tensor | None,
    scale: Tensor,
    ids: Tensor,
    coefficient: Tensor,
) -> None:
    """Set each row of the accumulators to ``scale * row + coefficient * weight[id]``."""
    head = call.head
    for block in spans(len(ids), call.shape.rows):
        call.kernels.combine(
            accumulator[block],
            scale[block],
            *_rounded_rows(call, head.weight, ids[block]),
            coefficient[block],
        )
        if low_rank_accumulator is not None and head.lora_b is not None:
            call.kernels.combine(
                low_rank_accumulator[block],
                scale[block],
                *_rounded_rows(call, head.lora_b, ids[block], is_factor=True),
                coefficient[block] * head.lora_scaling,
            )


def _label_logits(call: FusedCall, rows: Rows) -> Tensor:
    """Return x at the label of every row, from the rank that holds it; NaN for invalid ids."""
    head = call.head
    logits = torch.zeros(len(rows.ids), dtype=call.accumulation, device=rows.ids.device)
    for block in spans(len(rows.ids), call.shape.rows):
        ids, out = rows.ids[block], logits[block]
        call.kernels.label_dot(rows.hidden[block], *_rounded_rows(call, head.weight, ids), out)
        if rows.low_rank is not None and head.lora_b is not None:
            low_rank = rows.low_rank[block] * head.lora_scaling
            call.kernels.label_dot(
                low_rank, *_rounded_rows(call, head.lora_b, ids, is_factor=True), out
            )
    if head.bias is not None:
        is_here = (rows.ids >= 0) & (rows.ids < call.vocabulary.size)
        bias = head.bias[torch.where(is_here, rows.ids, 0)].to(call.accumulation)
        logits.add_(torch.where(is_here, bias, 0.0))
    if call.vocabulary.group is not None:
        call.vocabulary.all_reduce_sum_(logits)
    labels = rows.ids + call.vocabulary.start
    is_token = (labels >= 0) & (labels < call.vocabulary.total)
    return torch.where(is_token, call.transform.apply_(logits), torch.nan)


def _rounded_rows(
    call: FusedCall, weight: Tensor, ids: Tensor, *, is_factor: bool = False
) -> tuple[Tensor, Tensor]:
    """Return the weight and the ids of its rows, or a rounded copy of the rows and ids into it."""
    precision = call.head.precision
    if is_factor and not precision.rounds_factors:
        return weight, ids
    if precision.autocast is None or weight.dtype == precision.autocast:
        return weight, ids
    is_row = (ids >= 0) & (ids < weight.shape[0])
    rows = precision.rounded(weight[torch.where(is_row, ids, 0)])
    numbers = torch.arange(len(ids), device=ids.device)
    return rows, torch.where(is_row, numbers, NO_TOKEN)


class _Scratch:
    """The buffers and accumulators of a pass."""

    def __init__(self, call: FusedCall, rows: Rows, keeps: Keeps) -> None:
        self.call, self.rows, self.keeps = call, rows, keeps
        num_rows, hidden_size = rows.hidden.shape
        new = rows.hidden.new_empty
        height = min(call.shape.rows, num_rows)
        width = row_stride(min(call.shape.columns, call.vocabulary.size), call.stride_multiple)
        in_place = call.exponential == call.accumulation
        stashes = keeps is Keeps.STASH
        self.stash = self.whole_stash = None
        if stashes:
            self.whole_stash = new(num_rows, call.stash_width, dtype=call.exponential)
            call.kernels.expect_writes(self.whole_stash)
            self.whole_stash[:, call.vocabulary.size :].zero_()
            self.stash = self.whole_stash[:, : call.vocabulary.size]
        self.logits = None
        if not (stashes and in_place):
            self.logits = new(height * width, dtype=call.accumulation)
        self.exponentials = None
        if keeps is Keeps.SLOPES and not in_place:
            self.exponentials = new(height * width, dtype=call.exponential)
        self.accumulator = self.low_rank_accumulator = None
        if keeps is Keeps.SLOPES:
            self.accumulator = new(num_rows, hidden_size, dtype=call.accumulation)
            if rows.low_rank is not None:
                self.low_rank_accumulator = torch.empty_like(rows.low_rank)
        num_tiles = -(-call.vocabulary.size // call.shape.columns)
        self.tile_shifts = new(num_tiles, num_rows, dtype=call.accumulation) if stashes else None

    def tile(
        self,
        block: slice,
        columns: slice,
        head_tile: HeadTile,
        state: RowState,
        *,
        halve_bound: bool,
    ) -> Tile:
        """Return the tile of some rows and columns, its logits not yet computed."""
        call = self.call
        shape = block.stop - block.start, columns.stop - columns.start
        multiple = call.stride_multiple
        exponentials: Tensor | None = None
        if self.stash is not None:
            exponentials = self.stash[block, columns]
        elif self.exponentials is not None:
            exponentials = with_stride(self.exponentials, shape, multiple)
        if self.logits is not None:
            logits = with_stride(self.logits, shape, multiple)
        else:
            assert exponentials is not None
            logits = exponentials
        if self.keeps is Keeps.SLOPES and exponentials is None:
            exponentials = logits
        tile_shift = None
        if self.tile_shifts is not None:
            tile_shift = self.tile_shifts[columns.start // call.shape.columns, block]
        # What is stored is e * phi, and phi is at most scale / temperature.
        largest_slope = call.transform.logit_scale / call.transform.temperature
        bound = max(0.0, _BOUNDS[call.operand] - math.log(max(1.0, largest_slope)))
        accumulator, low_rank = self.accumulator, self.low_rank_accumulator
        if columns.start == 0:  # the first product sets them: there is nothing to rescale yet
            accumulator = low_rank = None
        return Tile(
            logits=logits,
            exponentials=exponentials,
            first_column=columns.start,
            bias=head_tile.bias,
            labels=self.rows.ids[block],
            transform=call.transform,
            bound=bound / 2 if halve_bound else bound,
            state=view_rows(state, block),
            tile_shift=tile_shift,
            accumulator=None if accumulator is None else accumulator[block],
            low_rank_accumulator=None if low_rank is None else low_rank[block],
        )

    def accumulate(self, block: slice, tile: Tile, head_tile: HeadTile) -> None:
        """Add ``E @ W`` of a tile, and the former top tokens that it has replaced."""
        if self.accumulator is None or tile.exponentials is None:
            return
        adds, rest_sum = tile.first_column > 0, tile.state.rest_sum
        accumulator, weight = self.accumulator[block], head_tile.weight
        add_by_weight(self.call, accumulator, tile.exponentials, weight, rest_sum, adds=adds)
        low_rank = self.low_rank_accumulator
        if low_rank is not None and head_tile.lora_b is not None:
            add_by_lora(self.call, low_rank[block], tile.exponentials, head_tile, adds=adds)
        if tile.state.released_ids is not None and tile.state.released_values is not None:
            self.add_back(block, tile.state.released_ids, tile.state.released_values)

    def add_back(self, block: slice, ids: Tensor, values: Tensor) -> None:
        """Add ``value * weight[id]`` to every row with a valid id, if ``E @ W`` is accumulated."""
        if self.accumulator is None:
            return
        low_rank = self.low_rank_accumulator
        add_weight_rows(
            self.call,
            self.accumulator[block],
            None if low_rank is None else low_rank[block],
            torch.ones_like(values),
            ids,
            values,
        )

    def restore_moved_rows(self, shift: Tensor) -> None:
        """Rescale the stash to the final shift, which few rows need."""
        if self.stash is None or self.tile_shifts is None:
            return
        for number, columns in enumerate(spans(self.call.vocabulary.size, self.call.shape.columns)):
            self.rescale(self.stash[:, columns], self.tile_shifts[number], shift)

    def move_shifts(self, old_shift: Tensor, new_shift: Tensor) -> None:
        """Rescale accumulators and stash to another shift."""
        for matrix in (self.accumulator, self.low_rank_accumulator, self.stash):
            self.rescale(matrix, old_shift, new_shift)

    def rescale(self, matrix: Tensor | None, old_shift: Tensor, new_shift: Tensor) -> None:
        """Rescale rows to another shift."""
        if matrix is None:
            return
        if self.call.row_kernels is not None:
            self.call.row_kernels.rescale_rows(matrix, old_shift, new_shift)
        else:
            scale = torch.where(old_shift == new_shift, 1.0, torch.exp(old_shift - new_shift))
            nowhere = torch.full_like(scale, NO_TOKEN, dtype=torch.int64)
            self.call.kernels.combine(matrix, scale, matrix[:0], nowhere, torch.zeros_like(scale))


def _drop_entries(stash: Tensor, ids: Tensor) -> None:
    """Set ``stash[n, ids[n]]`` to 0 where the id is a column."""
    is_column = (ids >= 0) & (ids < stash.shape[1])
    index = torch.where(is_column, ids, 0)[:, None]
    kept = stash.gather(1, index).masked_fill(is_column[:, None], 0.0)
    stash.scatter_(1, index, kept)
