"""From token log-probabilities to the loss of a preference batch, in float64 and without atomics.

Reads the objective's table; knows no vocabulary.  Letters: **S** = C * P sequences, **P** pairs,
**C** cells, **T** positions.
"""

from __future__ import annotations

import functools
from typing import TYPE_CHECKING

import torch
import triton
import triton.language as tl

from realign_kernels.backends.triton import launches

if TYPE_CHECKING:
    from torch import Tensor

    from realign_kernels.backends.kernel_set import PairBatch, PairResults
    from realign_kernels.objective import Objective

# Numbers of the table before its terms, and of a term: the layout that _pair_loss_kernel reads.
_HEADER_SIZE = 3
_TERM_SIZE = 9


@triton.jit
def _sum_sequences_kernel(
    token_logps_ptr, labels_ptr, starts_ptr, order_ptr, logps_ptr, counts_ptr,
    ignore_index, num_positions,
    BLOCK_T: tl.constexpr,
):  # fmt: skip
    """One program owns a sequence: a row of the padded form, or a segment of the sorted tokens."""
    s = tl.program_id(0).to(tl.int64)
    if order_ptr is not None:
        start, stop = tl.load(starts_ptr + s), tl.load(starts_ptr + s + 1)
    else:
        start = s * num_positions
        stop = start + num_positions
    sums = tl.zeros((BLOCK_T,), tl.float64)
    counts = tl.zeros((BLOCK_T,), tl.int64)
    for first in range(start, stop, BLOCK_T):
        offs_t = first + tl.arange(0, BLOCK_T)
        is_scored = offs_t < stop
        if order_ptr is not None:
            offs_t = tl.load(order_ptr + offs_t, mask=is_scored, other=0)
        labels = tl.load(labels_ptr + offs_t, mask=is_scored, other=ignore_index)
        is_scored = is_scored & (labels != ignore_index)
        sums += tl.load(token_logps_ptr + offs_t, mask=is_scored, other=0.0).to(tl.float64)
        counts += is_scored.to(tl.int64)
    # Rounded once to the dtype that callers see.
    total = tl.sum(sums, axis=0).to(token_logps_ptr.dtype.element_ty).to(tl.float64)
    tl.store(logps_ptr + s, total)
    tl.store(counts_ptr + s, tl.sum(counts, axis=0))


@triton.jit
def _log_sigmoid(x):
    y = tl.exp(-tl.abs(x))
    # log1p without a library: the rounding of 1 + y cancels.  Source: Goldberg 1991, theorem 4.
    u = 1.0 + y
    log1p = tl.where(u == 1.0, y, tl.log(u) * (y / tl.where(u == 1.0, 1.0, u - 1.0)))
    return tl.where(x < 0, x, 0.0) - log1p


@triton.jit
def _sigmoid(x):
    y = tl.exp(-tl.abs(x))
    return tl.where(x >= 0, 1.0, y) / (1.0 + y)


@triton.jit
def _link(contrast, beta, offset, smoothing, link):
    """Return the loss of a contrast and its derivative."""
    if link == 1:  # hinge
        gap = 1.0 - beta * contrast
        # NaN passes through, as it does in relu.
        loss = tl.where(gap <= 0, 0.0, gap)
        slope = tl.where(gap <= 0, 0.0, -beta)
    elif link == 2:  # ipo
        gap = contrast - 1.0 / (2.0 * beta)
        loss = gap * gap
        slope = 2.0 * gap
    else:  # logsigmoid
        x = beta * contrast - offset
        loss = -(1.0 - smoothing) * _log_sigmoid(x)
        # A smoothing of 0 is not multiplied: log_sigmoid(-x) is -inf where x is inf.
        loss -= tl.where(smoothing > 0, smoothing * _log_sigmoid(-x), 0.0)
        slope = beta * (smoothing * _sigmoid(x) - (1.0 - smoothing) * _sigmoid(-x))
    return loss, slope


@triton.jit
def _margin(log_ratios, is_present, offs_c, CELL: tl.constexpr):
    """Return the log-ratio of the chosen cell minus another's, 0 where either is absent."""
    is_one = ((offs_c == 0) | (offs_c == CELL)) & is_present
    chosen = tl.sum(tl.where(offs_c == 0, log_ratios, 0.0), axis=0)
    other = tl.sum(tl.where(offs_c == CELL, log_ratios, 0.0), axis=0)
    return tl.where(tl.sum(is_one.to(tl.int32), axis=0) == 2, chosen - other, 0.0)


@triton.jit
def _pair_loss_kernel(
    logps_ptr, counts_ptr, ref_logps_ptr, table_ptr, losses_ptr,
    rewards_ptr, text_margins_ptr, image_margins_ptr, coefficients_ptr,
    num_cells, num_pairs, num_terms,
    HEADER_SIZE: tl.constexpr, TERM_SIZE: tl.constexpr,
):  # fmt: skip
    """One program owns a pair; its cells are the lanes of a vector, absent ones empty."""
    p = tl.program_id(0).to(tl.int64)
    offs_c = tl.arange(0, 4)
    is_cell = offs_c < num_cells
    offs = offs_c * num_pairs + p
    nll_weight = tl.load(table_ptr)
    beta = tl.load(table_ptr + 1)
    image_beta = tl.load(table_ptr + 2)

    logps = tl.load(logps_ptr + offs, mask=is_cell, other=0.0)
    counts = tl.load(counts_ptr + offs, mask=is_cell, other=0)
    is_present = counts > 0
    # Absent cells are never divided by: they are selected away.
    counts = tl.where(is_present, counts, 1).to(tl.float64)
    log_ratios = logps
    if ref_logps_ptr is not None:
        log_ratios = logps - tl.load(ref_logps_ptr + offs, mask=is_cell, other=0.0)
    log_ratios = tl.where(is_present, log_ratios, 0.0)
    tl.store(rewards_ptr + offs, beta * log_ratios, mask=is_cell)
    text_margin = beta * _margin(log_ratios, is_present, offs_c, 1)
    image_margin = image_beta * _margin(log_ratios, is_present, offs_c, 2)
    tl.store(text_margins_ptr + p, text_margin)
    tl.store(image_margins_ptr + p, image_margin)

    loss = tl.zeros_like(nll_weight)
    gradient = tl.zeros_like(logps)
    for t in range(num_terms):
        term_ptr = table_ptr + HEADER_SIZE + t * TERM_SIZE
        factors = tl.load(term_ptr + offs_c)
        weight = tl.load(term_ptr + 4)
        link = tl.load(term_ptr + 8).to(tl.int32)
        is_per_token = link >= 2  # ipo, and the links counted on from there: by length
        link = link % 3
        is_read = factors != 0
        is_readable = tl.sum((is_read & (is_present == 0)).to(tl.int32), axis=0) == 0
        factors = tl.where(is_per_token, factors / counts, factors)
        contrast = tl.sum(tl.where(is_read, factors * log_ratios, 0.0), axis=0)
        term_loss, slope = _link(
            contrast, tl.load(term_ptr + 5), tl.load(term_ptr + 6), tl.load(term_ptr + 7), link
        )
        loss += tl.where(is_readable, weight * term_loss, 0.0)
        slope = weight * slope / num_pairs
        gradient += tl.where(is_read & is_readable, slope * factors, 0.0)
    if nll_weight > 0:
        is_chosen = (offs_c == 0) & is_present
        loss -= tl.sum(tl.where(is_chosen, nll_weight * logps / counts, 0.0), axis=0)
        gradient -= tl.where(is_chosen, nll_weight / counts / num_pairs, 0.0)
    tl.store(losses_ptr + p, loss)
    tl.store(coefficients_ptr + offs, gradient, mask=is_cell)


@functools.lru_cache(maxsize=64)
def _table(objective: Objective, device: torch.device) -> Tensor:
    """Return an objective as numbers on a device; the host waits at its first use there alone."""
    numbers = [objective.nll_weight, objective.beta, objective.image_beta]
    numbers += [number for row in objective.table() for number in row]
    return torch.tensor(numbers, dtype=torch.float64, device=device)


def _sort_tokens(batch: PairBatch, sequence_ids: Tensor) -> tuple[Tensor, Tensor]:
    """Return where each sequence starts in the order of tokens by sequence, and that order."""
    num_sequences = batch.num_cells * batch.num_pairs
    # Ignored tokens go to a segment past the last.
    is_scored = batch.labels != batch.ignore_index
    segments, order = torch.where(is_scored, sequence_ids, num_sequences).sort(stable=True)
    numbers = torch.arange(num_sequences + 1, device=segments.device)
    return torch.searchsorted(segments, numbers), order


def pair_loss(batch: PairBatch, results: PairResults) -> None:
    """Fill in the results of a preference batch."""
    num_cells, num_pairs = batch.num_cells, batch.num_pairs
    if num_pairs == 0:
        results.loss.zero_()
        return
    starts = order = None
    if batch.sequence_ids is not None:
        starts, order = _sort_tokens(batch, batch.sequence_ids)
    token_logps, num_positions = batch.token_logps, batch.labels.shape[-1]
    block, num_warps = launches.launch_of(
        "sum_sequences", token_logps.dtype, num_positions, token_logps.device
    )
    _sum_sequences_kernel[(num_cells * num_pairs,)](
        token_logps, batch.labels, starts, order, results.logps, results.counts,
        batch.ignore_index, num_positions,
        BLOCK_T=block,
        num_warps=num_warps,
    )  # fmt: skip
    losses = torch.empty_like(results.text_margins)
    _pair_loss_kernel[(num_pairs,)](
        results.logps, results.counts, batch.ref_logps,
        _table(batch.objective, token_logps.device), losses,
        results.rewards, results.text_margins, results.image_margins, results.coefficients,
        num_cells, num_pairs, len(batch.objective.terms),
        HEADER_SIZE=_HEADER_SIZE, TERM_SIZE=_TERM_SIZE,
        num_warps=1,
    )  # fmt: skip
    results.loss.copy_(losses.sum() / num_pairs)
