"""From token log-probabilities to the loss of a preference batch, in float64 and without atomics.

It reads the objective's table and needs no vocabulary. Letters: **S** = C * P sequences, **P**
pairs, **C** cells, **T** positions.
"""

from __future__ import annotations

import functools
import struct
from typing import TYPE_CHECKING

import torch
import triton
import triton.language as tl

from realign_kernels.backends.triton import launches
from realign_kernels.backends.triton.transform import log1p

if TYPE_CHECKING:
    from torch import Tensor

    from realign_kernels.backends.kernel_set import PairBatch, PairGradient, PairResults
    from realign_kernels.objective import Objective

# How many numbers of the table precede its terms, and how many a term has.
_HEADER_SIZE = tl.constexpr(3)
_TERM_SIZE = tl.constexpr(9)

# Elements of a block per pair: four cells, and as many again for warps of 64 threads.
_LANES = 8

# Up to this number of packed tokens, every sequence goes over all of them; more are sorted.
SCANNED_TOKENS = 8192


@triton.jit(do_not_specialize=["ignore_index", "num_tokens", "num_positions", "num_sequences"])
def _sum_sequences_kernel(
    token_logps_ptr, labels_ptr, ids_ptr, starts_ptr, order_ptr, logps_ptr, counts_ptr, fits_ptr,
    ignore_index, num_tokens, num_positions, num_sequences,
    BLOCK_T: tl.constexpr,
):  # fmt: skip
    """One program owns a sequence: a row of the padded form, a segment of sorted tokens, or those
    of all tokens that name it.
    """
    s = tl.program_id(0).to(tl.int64)
    if order_ptr is not None:
        start, stop = tl.load(starts_ptr + s), tl.load(starts_ptr + s + 1)
    elif ids_ptr is not None:
        start, stop = s * 0, s * 0 + num_tokens
    else:
        start, stop = s * num_positions, (s + 1) * num_positions
    sums = tl.zeros((BLOCK_T,), tl.float64)
    counts = tl.zeros((BLOCK_T,), tl.int64)
    num_bad = tl.zeros((BLOCK_T,), tl.int64)
    for first in range(start, stop, BLOCK_T):
        offs_t = first + tl.arange(0, BLOCK_T)
        is_scored = offs_t < stop
        if order_ptr is not None:
            offs_t = tl.load(order_ptr + offs_t, mask=is_scored, other=0)
        labels = tl.load(labels_ptr + offs_t, mask=is_scored, other=0)
        is_scored = is_scored & (labels != ignore_index)
        if ids_ptr is not None:
            ids = tl.load(ids_ptr + offs_t, mask=is_scored, other=0)
            num_bad += (is_scored & ((ids < 0) | (ids >= num_sequences))).to(tl.int64)
            is_scored = is_scored & (ids == s)
        sums += tl.load(token_logps_ptr + offs_t, mask=is_scored, other=0.0).to(tl.float64)
        counts += is_scored.to(tl.int64)
    # Rounded once to the dtype that callers see.
    total = tl.sum(sums, axis=0).to(token_logps_ptr.dtype.element_ty).to(tl.float64)
    is_sequence = s < num_sequences  # without sequences, one program only checks the ids
    tl.store(logps_ptr + s, total.to(logps_ptr.dtype.element_ty), mask=is_sequence)
    tl.store(counts_ptr + s, tl.sum(counts, axis=0), mask=is_sequence)
    if ids_ptr is not None:
        tl.store(fits_ptr, tl.sum(num_bad, axis=0) == 0, mask=s == 0)


@triton.jit
def _log_sigmoid(x):
    return tl.where(x < 0, x, 0.0) - log1p(tl.exp(-tl.abs(x)))


@triton.jit
def _sigmoid(x):
    y = tl.exp(-tl.abs(x))
    return tl.where(x >= 0, 1.0, y) / (1.0 + y)


@triton.jit
def _link(contrast, beta, offset, smoothing, link):
    """Return the loss of a contrast and its derivative."""
    if link == 1:  # hinge
        gap = 1.0 - beta * contrast
        # NaN passes through, as in relu.
        loss = tl.where(gap <= 0, 0.0, gap)
        slope = tl.where(gap <= 0, 0.0, -beta)
    elif link == 2:  # ipo
        gap = contrast - 1.0 / (2.0 * beta)
        loss = gap * gap
        slope = 2.0 * gap
    else:  # logsigmoid
        x = beta * contrast - offset
        loss = -(1.0 - smoothing) * _log_sigmoid(x)
        # Selected, since 0 * log_sigmoid(-x) is NaN where x is inf.
        loss -= tl.where(smoothing > 0, smoothing * _log_sigmoid(-x), 0.0)
        slope = beta * (smoothing * _sigmoid(x) - (1.0 - smoothing) * _sigmoid(-x))
    return loss, slope


@triton.jit
def _margin(log_ratios, is_present, offs_c, CELL: tl.constexpr):
    """Return the log-ratio of the chosen cell minus another's, 0 where either is absent."""
    is_one = ((offs_c == 0) | (offs_c == CELL)) & is_present
    chosen = tl.sum(tl.where(offs_c == 0, log_ratios, 0.0), axis=1)
    other = tl.sum(tl.where(offs_c == CELL, log_ratios, 0.0), axis=1)
    return tl.where(tl.sum(is_one.to(tl.int32), axis=1) == 2, chosen - other, 0.0)


@triton.jit
def _number(table, INDEX: tl.constexpr):
    """Return a number of the table, put together from the pieces of its bits."""
    low = (table[3 * INDEX] - 3).to(tl.int64) >> 1
    middle = (table[3 * INDEX + 1] - 3).to(tl.int64) >> 1
    high = (table[3 * INDEX + 2] - 3).to(tl.int64) >> 1
    return (low | (middle << 22) | (high << 44)).to(tl.float64, bitcast=True)


@triton.jit
def _term_number(table, TERM: tl.constexpr, INDEX: tl.constexpr):
    return _number(table, _HEADER_SIZE + TERM * _TERM_SIZE + INDEX)


@triton.jit(do_not_specialize=["num_cells", "num_pairs"])
def _pair_loss_kernel(
    logps_ptr, counts_ptr, ref_logps_ptr, lengths_ptr, table,
    loss_ptr, rewards_ptr, text_margins_ptr, image_margins_ptr, coefficients_ptr, fits_ptr,
    num_cells, num_pairs, stride_rc, stride_rp,
    NUM_TERMS: tl.constexpr, BLOCK_P: tl.constexpr,
):  # fmt: skip
    """One program goes over the pairs, so that the mean is summed in a fixed order."""
    offs_c = tl.arange(0, 4)[None, :]
    nll_weight = _number(table, 0)
    beta, image_beta = _number(table, 1), _number(table, 2)
    losses = tl.zeros((BLOCK_P,), tl.float64)
    num_wrong = tl.zeros((BLOCK_P,), tl.int32)
    for first in range(0, num_pairs, BLOCK_P):
        offs_p = first + tl.arange(0, BLOCK_P)
        is_pair = offs_p < num_pairs
        is_cell = (offs_c < num_cells) & is_pair[:, None]  # [BLOCK_P, 4], like all that follow
        offs = offs_c * num_pairs + offs_p[:, None]
        logps = tl.load(logps_ptr + offs, mask=is_cell, other=0.0).to(tl.float64)
        counts = tl.load(counts_ptr + offs, mask=is_cell, other=0)
        if lengths_ptr is not None:
            lengths = tl.load(lengths_ptr + offs, mask=is_cell, other=0)
            num_wrong += tl.sum((lengths != counts).to(tl.int32), axis=1)
        is_present = counts > 0
        # Nothing is divided by the count of an absent cell.
        counts = tl.where(is_present, counts, 1).to(tl.float64)
        log_ratios = logps
        if ref_logps_ptr is not None:
            offs_r = offs_c * stride_rc + offs_p[:, None] * stride_rp
            reference = tl.load(ref_logps_ptr + offs_r, mask=is_cell, other=0.0)
            log_ratios = logps - reference.to(tl.float64)
        log_ratios = tl.where(is_present, log_ratios, 0.0)
        rewards = beta * log_ratios
        tl.store(rewards_ptr + offs, rewards.to(rewards_ptr.dtype.element_ty), mask=is_cell)
        text_margins = beta * _margin(log_ratios, is_present, offs_c, 1)
        image_margins = image_beta * _margin(log_ratios, is_present, offs_c, 2)
        dtype: tl.constexpr = text_margins_ptr.dtype.element_ty
        tl.store(text_margins_ptr + offs_p, text_margins.to(dtype), mask=is_pair)
        tl.store(image_margins_ptr + offs_p, image_margins.to(dtype), mask=is_pair)

        gradient = tl.zeros((BLOCK_P, 4), tl.float64)
        for t in tl.static_range(NUM_TERMS):
            factors = tl.where(offs_c == 0, _term_number(table, t, 0), 0.0)
            factors = tl.where(offs_c == 1, _term_number(table, t, 1), factors)
            factors = tl.where(offs_c == 2, _term_number(table, t, 2), factors)
            factors = tl.where(offs_c == 3, _term_number(table, t, 3), factors)
            weight, link = _term_number(table, t, 4), _term_number(table, t, 8).to(tl.int32)
            is_per_token = link >= 2  # the code of ipo, and codes of links by length
            link = link % 3
            is_read = factors != 0
            num_unread = tl.sum((is_read & (is_present == 0)).to(tl.int32), axis=1)
            is_readable = is_pair & (num_unread == 0)
            factors = tl.where(is_per_token, factors / counts, factors)
            contrast = tl.sum(tl.where(is_read, factors * log_ratios, 0.0), axis=1)
            beta_t, offset = _term_number(table, t, 5), _term_number(table, t, 6)
            smoothing = _term_number(table, t, 7)
            term_losses, slopes = _link(contrast, beta_t, offset, smoothing, link)
            losses += tl.where(is_readable, weight * term_losses, 0.0)
            slopes = (weight * slopes / num_pairs)[:, None]
            gradient += tl.where(is_read & is_readable[:, None], slopes * factors, 0.0)
        if nll_weight > 0:
            is_chosen = (offs_c == 0) & is_present
            losses -= tl.sum(tl.where(is_chosen, nll_weight * logps / counts, 0.0), axis=1)
            gradient -= tl.where(is_chosen, nll_weight / counts / num_pairs, 0.0)
        tl.store(coefficients_ptr + offs, gradient, mask=is_cell)
    loss = tl.sum(losses, axis=0) / tl.maximum(num_pairs, 1)
    tl.store(loss_ptr, loss.to(loss_ptr.dtype.element_ty))
    tl.store(fits_ptr + 1, tl.sum(num_wrong, axis=0) == 0)


@triton.jit(do_not_specialize=["ignore_index", "num_tokens", "num_positions", "num_sequences"])
def _spread_gradient_kernel(
    grad_loss_ptr, grad_logps_ptr, coefficients_ptr, labels_ptr, ids_ptr, out_ptr,
    ignore_index, num_tokens, num_positions, num_sequences, num_pairs, stride_gc, stride_gp,
    BLOCK_T: tl.constexpr,
):  # fmt: skip
    """Store for every scored token the gradient of its sequence."""
    offs_t = tl.program_id(0).to(tl.int64) * BLOCK_T + tl.arange(0, BLOCK_T)
    is_token = offs_t < num_tokens
    labels = tl.load(labels_ptr + offs_t, mask=is_token, other=0)
    is_scored = is_token & (labels != ignore_index)
    if ids_ptr is not None:
        ids = tl.load(ids_ptr + offs_t, mask=is_scored, other=-1)
    else:
        ids = offs_t // num_positions
    is_scored = is_scored & (ids >= 0) & (ids < num_sequences)
    slopes = tl.zeros((BLOCK_T,), tl.float64)
    if grad_loss_ptr is not None:
        coefficients = tl.load(coefficients_ptr + ids, mask=is_scored, other=0.0)
        slopes += tl.load(grad_loss_ptr).to(tl.float64) * coefficients
    if grad_logps_ptr is not None:
        cell, pair = ids // num_pairs, ids % num_pairs
        grad_at = grad_logps_ptr + cell * stride_gc + pair * stride_gp
        slopes += tl.load(grad_at, mask=is_scored, other=0.0).to(tl.float64)
    slopes = tl.where(is_scored, slopes, 0.0)
    tl.store(out_ptr + offs_t, slopes.to(out_ptr.dtype.element_ty), mask=is_token)


@functools.lru_cache(maxsize=64)
def _table(objective: Objective) -> tuple[int, ...]:
    """Return an objective as arguments of a kernel: the bits of every number in three pieces.

    Arguments need no copy to the device, which a CUDA graph could not capture.  A float argument
    would be rounded to 32 bits; an integer that is 1 or a multiple of 16 would compile the kernel
    again, which twice a piece plus 3 never is.
    """
    numbers = [objective.nll_weight, objective.beta, objective.image_beta]
    numbers += [number for row in objective.table() for number in row]
    bits = struct.unpack(f"<{len(numbers)}Q", struct.pack(f"<{len(numbers)}d", *numbers))
    return tuple((whole >> start & 0x3FFFFF) * 2 + 3 for whole in bits for start in (0, 22, 44))


def _sort_tokens(batch: PairBatch, sequence_ids: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Return each sequence's start in the order of tokens by sequence, that order, and whether all
    ids are in range.
    """
    num_sequences = batch.num_cells * batch.num_pairs
    is_scored = batch.labels != batch.ignore_index
    is_inside = (sequence_ids >= 0) & (sequence_ids < num_sequences)
    # Ignored tokens and ids out of range go to an extra last segment.
    ids = torch.where(is_scored & is_inside, sequence_ids, num_sequences)
    segments, order = ids.sort(stable=True)
    numbers = torch.arange(num_sequences + 1, device=segments.device)
    return torch.searchsorted(segments, numbers), order, (is_inside | ~is_scored).all()


def pair_loss(batch: PairBatch, results: PairResults) -> Tensor:
    """Fill in the results of a preference batch; return whether ids are in range and counts fit."""
    num_cells, num_pairs = batch.num_cells, batch.num_pairs
    num_sequences, device = num_cells * num_pairs, batch.labels.device
    token_logps, sequence_ids = batch.token_logps, batch.sequence_ids
    fits = batch.labels.new_empty(2, dtype=torch.bool)
    starts = order = None
    if sequence_ids is not None and len(sequence_ids) > SCANNED_TOKENS:
        starts, order, are_inside = _sort_tokens(batch, sequence_ids)
        fits[0].copy_(are_inside)
        sequence_ids = None
    width = batch.labels.shape[-1]
    block, num_warps = launches.launch_of("sum_sequences", token_logps.dtype, width, device)
    if num_sequences > 0 or sequence_ids is not None:
        _sum_sequences_kernel[(max(1, num_sequences),)](
            token_logps, batch.labels, sequence_ids, starts, order,
            results.logps, results.counts, fits,
            batch.ignore_index, token_logps.numel(), width, num_sequences,
            BLOCK_T=block,
            num_warps=num_warps,
        )  # fmt: skip
    block, num_warps = launches.launch_of(
        "pair_loss", results.coefficients.dtype, _LANES * num_pairs, device
    )
    ref_logps = batch.ref_logps
    _pair_loss_kernel[(1,)](
        results.logps, results.counts, ref_logps, batch.lengths, _table(batch.objective),
        results.loss, results.rewards, results.text_margins, results.image_margins,
        results.coefficients, fits,
        num_cells, num_pairs, *((0, 0) if ref_logps is None else ref_logps.stride()),
        NUM_TERMS=len(batch.objective.terms),
        BLOCK_P=max(1, block // _LANES),
        num_warps=num_warps,
    )  # fmt: skip
    return fits


def spread_gradient(gradient: PairGradient, out: Tensor) -> None:
    """Set every scored token of ``out`` to the gradient of its sequence, any other to 0."""
    labels, grad_logps = gradient.labels, gradient.grad_logps
    num_tokens = labels.numel()
    if num_tokens == 0:
        return
    block, num_warps = launches.launch_of("sum_sequences", torch.float64, num_tokens, labels.device)
    _spread_gradient_kernel[(triton.cdiv(num_tokens, block),)](
        gradient.grad_loss, grad_logps, gradient.coefficients, labels, gradient.sequence_ids, out,
        gradient.ignore_index, num_tokens, labels.shape[-1], gradient.coefficients.numel(),
        gradient.coefficients.shape[1], *((0, 0) if grad_logps is None else grad_logps.stride()),
        BLOCK_T=block,
        num_warps=num_warps,
    )  # fmt: skip
