"""The kernels in plain PyTorch, for any device and dtype: backend "eager".

It shows in a few lines what the C++ and Triton kernels do. It does not use autograd, and its
callers have checked all arguments.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch
from torch import Tensor

from realign_kernels.backends import cpu
from realign_kernels.objective import differentiate_losses, reduce_losses
from realign_kernels.tiling import TileShape, spans

if TYPE_CHECKING:
    from collections.abc import Iterator

    from realign_kernels.backends.kernel_set import PairBatch, PairResults, Tile

LARGEST_TILE = TileShape(1024, 4096)
STRIDE_MULTIPLE = 64  # as in the Triton kernels, for products on GPUs
TEMPORARIES = 2

_INF = float("inf")
# Largest number of elements of a copy of rows of the weight or of hidden states.
_MAX_ELEMENTS = 1 << 18


def operand_dtype(computed: torch.dtype, rounded: torch.dtype, *, is_given: bool) -> torch.dtype:
    """Return the dtype of sums, which every device can multiply."""
    return computed


def exponential_dtype(computed: torch.dtype, operand: torch.dtype) -> torch.dtype:
    """Return the dtype of sums, as for everything else."""
    return computed


def expect_writes(tensor: Tensor) -> None:
    """Do nothing: no tensor needs it here."""


def product(out: Tensor, a: Tensor, b: Tensor, *, adds: bool) -> None:
    """Set ``out`` to ``a @ b``, or add that."""
    if out.device.type == "cpu":
        cpu.product(out, a, b, adds=adds)
    elif adds:
        out.addmm_(a, b)
    else:
        torch.mm(a, b, out=out)


def epilogue(tile: Tile) -> None:
    """Fold a tile of logits into the sums of its rows."""
    x, state = tile.logits, tile.state
    if tile.bias is not None:
        x.add_(tile.bias)
    tile.transform.apply_(x)
    labels = tile.labels - tile.first_column
    if state.logit_sum is not None:
        state.logit_sum.add_(x.sum(dim=1))
    if state.label_logits is not None:
        is_inside, index = _locate(x, labels)
        label_logits = x.gather(1, index).squeeze(1)
        state.label_logits.copy_(torch.where(is_inside, label_logits, state.label_logits))
    # From here on the label's column counts as absent, and later that of the top token.
    _put(x, labels, -_INF)
    own_top: Tensor | None = None
    entry: Tensor | float = 0.0
    if tile.replays:
        _exponentiate(tile)
        if state.top_ids is not None:
            own_top = state.top_ids - tile.first_column
    else:
        top, column = x.max(dim=1)
        _move_shift(tile, top)
        if state.top_ids is not None:
            own_top = _update_top(tile, top, column)
            _put(x, own_top, -_INF)
            if state.released_ids is None:
                # A stash keeps the entry, and drops that of the last top token at the end; an
                # accumulator gets an entry when its token is released.
                entry = torch.exp(top - state.shift) * tile.transform.slope(top)
        _exponentiate(tile)
        if tile.tile_shift is not None:
            tile.tile_shift.copy_(state.shift)
    if tile.exponentials is not None:
        # Not left to exp(-inf): with a softcap the slope there is -inf, and 0 * -inf is NaN.
        _put(x, labels, 0.0)
        if own_top is not None:
            _put(x, own_top, entry)
        if tile.exponentials.data_ptr() != x.data_ptr():
            tile.exponentials.copy_(x)


def _locate(x: Tensor, columns: Tensor) -> tuple[Tensor, Tensor]:
    """Return whether each row's column is in the tile, and a valid index (rows, 1) in any case."""
    is_inside = (columns >= 0) & (columns < x.shape[1])
    return is_inside, torch.where(is_inside, columns, 0)[:, None]


def _put(x: Tensor, columns: Tensor, value: Tensor | float) -> None:
    """Set ``x[n, columns[n]]`` to a value where that is a column of the tile."""
    is_inside, index = _locate(x, columns)
    x.scatter_(1, index, torch.where(is_inside, value, x.gather(1, index).squeeze(1))[:, None])


def _move_shift(tile: Tile, top: Tensor) -> None:
    """Rescale the sums where the largest logit lies too far above the shift."""
    state = tile.state
    # The second condition is the start of a row whose label has probability 0.
    moves = ((top - state.shift > tile.bound) | (state.shift == -_INF)) & (top > -_INF)
    log_decay = torch.where(moves, state.shift - top, 0.0)
    decay = torch.exp(log_decay)
    if state.rest_entropy_sum is not None and state.rest_square_sum is not None:
        # -(a e) log(a e) = a (-e log e) - a log(a) e
        moved = decay * state.rest_entropy_sum - decay * log_decay * state.rest_sum
        state.rest_entropy_sum.copy_(torch.where(decay == 0, 0.0, moved))
        state.rest_square_sum.mul_(decay.square())
    state.rest_sum.mul_(decay)
    for matrix in (tile.accumulator, tile.low_rank_accumulator):
        if matrix is not None:
            matrix.mul_(decay[:, None])
    state.shift.copy_(torch.where(moves, top, state.shift))


def _update_top(tile: Tile, top: Tensor, column: Tensor) -> Tensor:
    """Return the columns of new top tokens, or -1; the old top tokens join the sums."""
    state = tile.state
    assert state.top_logits is not None
    assert state.top_ids is not None
    is_new = top > state.top_logits
    is_released = is_new & (state.top_logits > -_INF)
    log_e = torch.where(is_released, state.top_logits - state.shift, -_INF)
    e = torch.exp(log_e)
    state.rest_sum.add_(e)
    if state.rest_entropy_sum is not None and state.rest_square_sum is not None:
        state.rest_entropy_sum.add_(torch.where(e == 0, 0.0, -e * log_e))
        state.rest_square_sum.add_(e.square())
    if state.released_ids is not None and state.released_values is not None:
        state.released_ids.copy_(torch.where(is_released, state.top_ids, -1))
        values = e * tile.transform.slope(state.top_logits)
        state.released_values.copy_(torch.where(is_released, values, 0.0))
    state.top_logits.copy_(torch.where(is_new, top, state.top_logits))
    state.top_ids.copy_(torch.where(is_new, tile.first_column + column, state.top_ids))
    return torch.where(is_new, column, -1)


def _exponentiate(tile: Tile) -> None:
    """Turn x into ``e * phi`` where it is kept, and add e unless the sums are final."""
    x, state = tile.logits, tile.state
    slope = None
    if tile.exponentials is not None:
        slope = tile.transform.slope(x if tile.transform.logit_softcap is not None else x[:, :1])
    # If all x so far are -inf, every exponential is 0; -inf - -inf would give NaN.
    x.sub_(torch.where(state.shift == -_INF, 0.0, state.shift)[:, None]).exp_()
    if not tile.replays:
        state.rest_sum.add_(x.sum(dim=1))
        if state.rest_entropy_sum is not None and state.rest_square_sum is not None:
            state.rest_entropy_sum.add_(torch.special.entr(x).sum(dim=1))
            state.rest_square_sum.add_(x.square().sum(dim=1))
    if slope is not None:
        x.mul_(slope)


def label_dot(hidden: Tensor, weight: Tensor, ids: Tensor, out: Tensor) -> None:
    """Add ``hidden[n] . weight[ids[n]]`` to ``out[n]`` where the id is a row of the weight."""
    for block in _blocks(hidden):
        rows = _rows_of(weight, ids[block], out.dtype)
        out[block] += rows.mul_(hidden[block]).sum(dim=1)


def combine(
    accumulator: Tensor, scale: Tensor, weight: Tensor, ids: Tensor, coefficient: Tensor
) -> None:
    """Set each row to ``scale * row + coefficient * weight[id]``; invalid ids add nothing."""
    for block in _blocks(accumulator):
        accumulator[block] *= scale[block, None].to(accumulator.dtype)
        if len(weight) > 0:
            rows = _rows_of(weight, ids[block], coefficient.dtype)
            accumulator[block] += rows.mul_(coefficient[block, None])


def _rows_of(weight: Tensor, ids: Tensor, dtype: torch.dtype) -> Tensor:
    """Return rows of the weight, 0 where the id is out of range."""
    is_row = (ids >= 0) & (ids < len(weight))
    rows = weight[torch.where(is_row, ids, 0)].to(dtype)
    return rows.masked_fill_(~is_row[:, None], 0.0)


def _blocks(matrix: Tensor) -> Iterator[slice]:
    """Cut rows into blocks that are small enough to copy."""
    return spans(len(matrix), max(1, _MAX_ELEMENTS // max(1, matrix.shape[1])))


def add_entries(
    out: Tensor, starts: Tensor, order: Tensor, coefficient: Tensor, hidden: Tensor
) -> None:
    """Add ``coefficient * hidden`` of the entries ``order[starts[v]:starts[v + 1]]`` to row v."""
    if len(order) == 0:
        return
    # Entries are sorted by row, so that they are added in a fixed order, on a GPU too.
    numbers = torch.arange(len(order), device=order.device)
    rows = torch.searchsorted(starts, numbers, right=True) - 1
    is_inside = (rows >= 0) & (rows < len(out))
    rows = torch.where(is_inside, rows, 0)
    factors = torch.where(is_inside, coefficient[order], 0.0)
    for block in spans(len(order), max(1, _MAX_ELEMENTS // max(1, out.shape[1]))):
        entries = hidden[order[block] % len(hidden)].to(out.dtype).mul_(factors[block, None])
        entries.masked_fill_(~is_inside[block, None], 0.0)
        if out.is_cuda:
            out.index_put_((rows[block],), entries, accumulate=True)
        else:
            out.index_add_(0, rows[block], entries)


def pair_loss(batch: PairBatch, results: PairResults) -> None:
    """Fill in the results of a preference batch."""
    shape, wide = (batch.num_cells, batch.num_pairs), results.coefficients.dtype
    logps, counts = (part.view(shape) for part in _sum_sequences(batch, wide))
    ref_logps = None if batch.ref_logps is None else batch.ref_logps.to(wide)
    log_ratios = logps if ref_logps is None else logps - ref_logps
    log_ratios = torch.where(counts > 0, log_ratios, 0.0)
    output = reduce_losses(logps, ref_logps, batch.objective, counts)
    results.logps.copy_(logps)
    results.counts.copy_(counts)
    results.loss.copy_(output.loss)
    results.rewards.copy_(output.rewards)
    results.text_margins.copy_(output.text_margins)
    results.image_margins.copy_(output.image_margins)
    results.coefficients.copy_(differentiate_losses(log_ratios, batch.objective, counts))


def _sum_sequences(batch: PairBatch, wide: torch.dtype) -> tuple[Tensor, Tensor]:
    """Return sums of log-probabilities, rounded to their dtype, and numbers of scored tokens.

    Sums are taken in the wider dtype and rounded once, so that packed and padded batches agree
    whatever the order of tokens.
    """
    is_scored = batch.labels != batch.ignore_index
    token_logps = torch.where(is_scored, batch.token_logps, 0.0).to(wide)
    if batch.sequence_ids is None:
        sums, counts = token_logps.sum(dim=-1), is_scored.sum(dim=-1)
    else:
        # Ignored tokens and ids out of range go to an extra last segment, which is dropped.
        size = batch.num_cells * batch.num_pairs
        is_counted = is_scored & (batch.sequence_ids >= 0) & (batch.sequence_ids < size)
        segments, order = torch.where(is_counted, batch.sequence_ids, size).sort(stable=True)
        bounds = torch.searchsorted(segments, torch.arange(size + 1, device=segments.device))
        # Not torch.segment_reduce, which only CPUs and CUDA have.
        sums = token_logps.new_zeros(size + 1)
        if sums.is_cuda:
            sums.index_put_((segments,), token_logps[order], accumulate=True)
        else:
            sums.index_add_(0, segments, token_logps[order])
        sums, counts = sums[:size], bounds.diff()
    return sums.to(batch.token_logps.dtype).to(wide), counts
