"""Log-probabilities and the gradients of the inputs, from the sums of the forward.

The gradient of a row's raw logits is ``scale * E``, with exact entries at the label and the top
token, where E holds 0.  Letters as in ``forward.py``.
"""

from __future__ import annotations

import functools
from typing import TYPE_CHECKING, NamedTuple

import torch
from torch import Tensor

from realign_kernels.backends.kernel_set import RowState, Tile
from realign_kernels.fused.forward import (
    FusedCall,
    PassResult,
    Rows,
    add_by_lora,
    add_by_weight,
    add_weight_rows,
    fold_tile,
    logits_into,
    multiply_parts,
    view_rows,
)
from realign_kernels.head import split
from realign_kernels.tiling import row_stride, spans, with_stride

if TYPE_CHECKING:
    from collections.abc import Callable

    from realign_kernels.head import Head, HeadTile, LogitTransform


class RowNumbers(NamedTuple):
    """Numbers of every row, (N,) each, from which its results and its gradients are computed.

    ``rest_sum`` is relative to ``shift`` and leaves out the label and, where it is tracked, the top
    token, whose local id may be outside this shard.
    """

    label_logits: Tensor
    shift: Tensor
    rest_sum: Tensor
    top_logits: Tensor | None
    top_ids: Tensor | None

    @classmethod
    def of(cls, result: PassResult, num_rows: int) -> RowNumbers:
        """Take the numbers from a pass, without the empty rows at the end."""
        state = result.state
        parts = (
            result.label_logits, state.shift, state.rest_sum, state.top_logits, state.top_ids
        )  # fmt: skip
        return cls(*(None if part is None else part[:num_rows] for part in parts))  # type: ignore[arg-type]

    @property
    def log_label(self) -> Tensor:
        """Logit of the label above the shift, or above itself where the shift was never set."""
        base = torch.where(self.shift == -torch.inf, self.label_logits, self.shift)
        # Equal infinities, in a row without any finite logit, give NaN as they should.
        return self.label_logits - base

    @property
    def excess(self) -> Tensor:
        """Amount to subtract from logarithms so that the label's exponential cannot overflow.

        0 where the shift started at the label, which is everywhere but in float16.
        """
        return self.log_label.clamp(min=0)

    @property
    def log_total(self) -> Tensor:
        """Logarithm of the sum of all exponentials, relative to the shift."""
        label = torch.exp(self.log_label)
        rest = self.rest_sum + self.top
        large = self.log_label + torch.log1p(rest * torch.exp(-self.log_label))
        return torch.where(self.log_label >= 0, large, torch.log(label + rest))

    @property
    def lse(self) -> Tensor:
        """Logarithm of the sum of the exponentials of x."""
        base = torch.where(self.shift == -torch.inf, self.label_logits, self.shift)
        return base + self.log_total

    @property
    def log_top(self) -> Tensor | None:
        """Logit of the top token above the shift."""
        if self.top_logits is None:
            return None
        none = self.top_logits == -torch.inf
        return torch.where(none, -torch.inf, self.top_logits - self.shift)

    @property
    def top(self) -> Tensor | float:
        """Exponential of the top token."""
        return 0.0 if self.log_top is None else torch.exp(self.log_top)


class LogitGradient(NamedTuple):
    """The gradient of every row's raw logits: ``scale * E`` except at the label and the top token.

    With ``entropy`` it is ``scale * E * (entropy.constant + entropy.factor * (log p + H))``.
    """

    scale: Tensor
    at_label: Tensor
    at_top: Tensor | None
    entropy: EntropyGradient | None = None


class EntropyGradient(NamedTuple):
    """Factors of E in the gradient of entropies, (N,) each; the largest is about 1."""

    constant: Tensor
    factor: Tensor
    log_total: Tensor  # of the exponentials, relative to the shift
    entropy: Tensor  # H


class Upstream(NamedTuple):
    """Upstream gradients of the results of a row, (N,) each; None where there are none."""

    label: Tensor  # of log p(label)
    top: Tensor | None = None  # of log p(top)
    lse: Tensor | None = None
    entropy: Tensor | None = None


def token_log_probs(numbers: RowNumbers) -> Tensor:
    """Return log p(label), (N,); NaN where the label is not a token or its logit is infinite."""
    logps = _log_share(numbers.log_label, numbers.rest_sum + numbers.top)
    return torch.where(numbers.label_logits == torch.inf, torch.nan, logps)


def top_log_probs(numbers: RowNumbers) -> Tensor:
    """Return log p(top), (N,); -inf where there is no other token."""
    assert numbers.log_top is not None
    return log_share_beside_label(numbers, numbers.log_top, numbers.rest_sum)


def _log_share(log_part: Tensor, others: Tensor) -> Tensor:
    """Return ``log(part / (part + others))``, exact where either is far larger."""
    part = torch.exp(log_part)
    large = -torch.log1p(others * torch.exp(-log_part))
    return torch.where(log_part >= 0, large, log_part - torch.log(part + others))


def log_share_beside_label(numbers: RowNumbers, log_part: Tensor, rest: Tensor) -> Tensor:
    """Return ``log(part / (part + rest + label))``."""
    excess = numbers.excess
    others = rest * torch.exp(-excess) + torch.exp(numbers.log_label - excess)
    return _log_share(log_part - excess, others)


def logit_gradient(
    numbers: RowNumbers,
    transform: LogitTransform,
    upstream: Upstream,
    entropy: Tensor | None = None,
) -> LogitGradient:
    """Return the gradient of the raw logits, from the upstream gradients of the results of rows.

    ``entropy`` is that of every row, and required if it has an upstream gradient.
    """
    decay = torch.exp(-numbers.excess)
    label = torch.exp(numbers.log_label - numbers.excess)
    top, rest = decay * numbers.top, decay * numbers.rest_sum
    total = label + top + rest
    grad_label, grad_top, grad_lse, grad_entropy = upstream
    grad = grad_label if grad_top is None else grad_label + grad_top
    # Shares of the sums, since 1 - p would cancel.
    at_label = grad_label * ((rest + top) / total)
    at_top = None
    if grad_top is not None:
        at_label = at_label - grad_top * (label / total)
    if grad_lse is not None:
        grad = grad - grad_lse
        at_label = at_label + grad_lse * (label / total)
    if numbers.top_logits is not None:
        at_top = -grad_label * (top / total)
        if grad_top is not None:
            at_top = at_top + grad_top * ((rest + label) / total)
        if grad_lse is not None:
            at_top = at_top + grad_lse * (top / total)
    scale, entropy_gradient = -grad, None
    if grad_entropy is not None and entropy is not None:
        at_label = at_label + grad_entropy * _entropy_slope(token_log_probs(numbers), entropy)
        if at_top is not None:
            at_top = at_top + grad_entropy * _entropy_slope(top_log_probs(numbers), entropy)
        size = grad.abs() + grad_entropy.abs()
        scale = torch.where(size == 0, 1.0, size)
        entropy_gradient = EntropyGradient(
            -grad / scale, -grad_entropy / scale, numbers.log_total, entropy
        )
    if numbers.top_logits is not None and at_top is not None:
        at_top = at_top * transform.slope(numbers.top_logits)
        at_top = torch.where(numbers.top_logits == -torch.inf, 0.0, at_top)
    return LogitGradient(
        scale=scale * decay / total,
        at_label=at_label * transform.slope(numbers.label_logits),
        at_top=at_top,
        entropy=entropy_gradient,
    )


def _entropy_slope(log_p: Tensor, entropy: Tensor) -> Tensor:
    """Return the derivative of the entropy with respect to a token's x: ``-p * (log p + H)``."""
    return torch.where(log_p == -torch.inf, 0.0, -torch.exp(log_p) * (log_p + entropy))


def by_scoring(is_top: Tensor, grad: Tensor) -> tuple[Tensor, Tensor]:
    """Split the gradient of the scores into those of the labels and of the top tokens."""
    return torch.where(is_top, 0.0, grad), torch.where(is_top, grad, 0.0)


class Needed(NamedTuple):
    """The inputs that need a gradient."""

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
    """Turn ``E @ W`` into the gradient of hidden states, ``E @ B`` into that of ``hidden @ A.T``.

    Both accumulators are overwritten; rows beyond those of ``gradient`` are dropped.
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
    if call.vocabulary.group is not None:
        call.vocabulary.all_reduce_sum_(accumulator)
        if low_rank_accumulator is not None:
            call.vocabulary.all_reduce_sum_(low_rank_accumulator)
    if low_rank_accumulator is None or call.head.lora_a is None:
        return accumulator[:num_rows], None
    for block in spans(len(accumulator), call.shape.rows):
        call.kernels.product(
            accumulator[block], low_rank_accumulator[block], call.head.lora_a, adds=True
        )
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
    """Go over the vocabulary once more, with E stashed or computed again, and return gradients.

    ``onto`` holds gradients of the head, in the accumulation dtype, to which these are added.
    """
    sums = _Sums(call, rows, numbers, gradient, needed, onto)
    exponentials: _Stashed | _Replayed
    if gradient.entropy is not None:
        exponentials = _Weighted(call, rows, numbers, gradient.entropy)
    elif stash is not None:
        exponentials = _Stashed(stash)
    else:
        exponentials = _Replayed(call, rows, numbers)
    for columns in spans(call.vocabulary.size, call.shape.columns):
        tile = call.head.tile(columns)
        sums.begin(columns)
        for block in spans(len(gradient.scale), exponentials.block_rows(call)):
            sums.add(block, exponentials.get(block, columns, tile), tile)
        sums.end(columns)
        del tile  # or two casts of the head would be in memory at once
    return sums.finish()


class _Stashed:
    """E as the forward kept it."""

    def __init__(self, stash: Tensor) -> None:
        self.stash = stash

    def block_rows(self, call: FusedCall) -> int:
        # No scratch is needed, so one product takes all rows.
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
        multiple = call.stride_multiple
        width = row_stride(min(call.shape.columns, call.vocabulary.size), multiple)
        self.logits = rows.hidden.new_empty(height * width, dtype=call.accumulation)
        self.exponentials = self.logits
        if call.exponential != call.accumulation:
            self.exponentials = rows.hidden.new_empty(height * width, dtype=call.exponential)

    def block_rows(self, call: FusedCall) -> int:
        return call.shape.rows

    def buffers(self, block: slice, columns: slice) -> tuple[Tensor, Tensor]:
        """Return buffers for the raw logits of a tile, and for their exponentials."""
        shape = block.stop - block.start, columns.stop - columns.start
        logits, exponentials = (
            with_stride(buffer, shape, self.call.stride_multiple)
            for buffer in (self.logits, self.exponentials)
        )
        return logits, exponentials

    def get(self, block: slice, columns: slice, tile: HeadTile) -> Tensor:
        logits, exponentials = self.buffers(block, columns)
        replayed = Tile(
            logits=logits,
            exponentials=exponentials,
            first_column=columns.start,
            bias=tile.bias,
            labels=self.rows.ids[block],
            transform=self.call.transform,
            bound=torch.inf,
            state=view_rows(self.state, block),
            replays=True,
        )
        fold_tile(self.call, replayed, self.rows, block, tile)
        return exponentials


class _Weighted(_Replayed):
    """E times the factors of the entropy gradient, in plain torch, since few calls need it."""

    def __init__(
        self, call: FusedCall, rows: Rows, numbers: RowNumbers, entropy: EntropyGradient
    ) -> None:
        super().__init__(call, rows, numbers)
        self.entropy = entropy

    def get(self, block: slice, columns: slice, tile: HeadTile) -> Tensor:
        x, out = self.buffers(block, columns)
        logits_into(self.call, x, self.rows, block, tile)
        if tile.bias is not None:
            x.add_(tile.bias)
        transform, shift = self.call.transform, self.state.shift[block]
        transform.apply_(x)
        linear = transform.logit_scale / transform.temperature
        slope = linear if transform.logit_softcap is None else transform.slope(x)
        # Only labels have a probability where the shift is not finite.
        x.sub_(torch.where(shift == -torch.inf, 0.0, shift)[:, None])
        e = torch.exp(x)
        is_nothing = e == 0
        constant, factor, log_total, entropy = (part[block, None] for part in self.entropy)
        x.sub_(log_total).add_(entropy).mul_(factor).add_(constant)
        e.mul_(x).mul_(slope).masked_fill_(is_nothing, 0.0)
        top_ids = self.state.top_ids
        for ids in (self.rows.ids, *(() if top_ids is None else (top_ids,))):
            # Their exact entries are added separately.
            ids = ids[block] - columns.start
            is_here = (ids >= 0) & (ids < e.shape[1])
            index = torch.where(is_here, ids, 0)[:, None]
            kept = e.gather(1, index).masked_fill_(is_here[:, None], 0.0)
            e.scatter_(1, index, kept)
        return out.copy_(e)


class _Sums:
    """The gradients, to which tiles of E are added."""

    def __init__(
        self,
        call: FusedCall,
        rows: Rows,
        numbers: RowNumbers,
        gradient: LogitGradient,
        needed: Needed,
        onto: Gradients | None,
    ) -> None:
        top_ids = numbers.top_ids
        self.call, self.rows, self.gradient, self.top_ids = call, rows, gradient, top_ids
        self.onto = onto
        head, num_rows = call.head, len(gradient.scale)
        has_low_rank = head.lora_a is not None
        self.needed = needed
        new = rows.hidden.new_zeros
        # Products over rows take scaled rows; results of products over columns are scaled later.
        scale = gradient.scale[:, None]
        self.scaled_hidden = self.scaled_low_rank = self.scaled_ones = None
        self.scaled_low_rank_parts = None
        weight_unit = bias_unit = None
        self.rest_sum = numbers.rest_sum
        if needed.weight and call.exponential == call.operand:
            hidden = rows.hidden[:num_rows] * scale
            self.scaled_hidden, weight_unit = _in_range(hidden, call.operand)
        if needed.bias:
            self.scaled_ones, bias_unit = _in_range(scale, call.exponential)
        if needed.lora_b and rows.low_rank is not None:
            self.scaled_low_rank = rows.low_rank[:num_rows] * scale * head.lora_scaling
            if head.precision.splits_factors:
                self.scaled_low_rank_parts = torch.cat(split(self.scaled_low_rank, 2), dim=1)
        self.accumulator = self.low_rank_accumulator = None
        if needed.hidden or (has_low_rank and needed.lora_a):
            shape = len(rows.hidden), head.weight.shape[1]  # with the empty rows, as in the forward
            self.accumulator = new(shape, dtype=call.accumulation)
            if head.lora_a is not None:
                self.low_rank_accumulator = new(shape[0], len(head.lora_a), dtype=call.accumulation)
        self.entries = _Entries(call, rows.ids[:num_rows], gradient, top_ids)
        self.weight, self.bias, self.lora_b = _new_gradients(head, needed)
        if onto is None and self.weight is not None:
            call.kernels.expect_writes(self.weight)
        if onto is not None:
            self.weight, self.bias, self.lora_b = onto.weight, onto.bias, onto.lora_b
        column = None if self.bias is None else self.bias[:, None]
        wide, continues = call.accumulation, onto is not None
        self.weight_sum = _Sum(self.weight, wide, weight_unit, continues=continues)
        self.bias_sum = _Sum(column, wide, bias_unit, continues=continues)
        self.lora_b_sum = _Sum(self.lora_b, wide, None, continues=continues)

    def begin(self, columns: slice) -> None:
        """Start the parts of a range of the vocabulary."""
        for part in (self.weight_sum, self.bias_sum, self.lora_b_sum):
            part.begin(columns)

    def add(self, block: slice, exponentials: Tensor, tile: HeadTile) -> None:
        """Add some rows of a tile."""
        product, rest_sum = self.call.kernels.product, self.rest_sum[block]
        if self.accumulator is not None:
            accumulator = self.accumulator[block]
            add_by_weight(self.call, accumulator, exponentials, tile.weight, rest_sum)
        if self.low_rank_accumulator is not None and tile.lora_b is not None:
            add_by_lora(self.call, self.low_rank_accumulator[block], exponentials, tile)
        if self.scaled_hidden is not None:
            self.weight_sum.add(product, exponentials.T, self.scaled_hidden[block])
        elif self.needed.weight:
            # Hidden states are narrower than exponentials and stay exact; the latter are scaled.
            scaled_product = functools.partial(
                self.call.kernels.exponential_product,
                totals=self.call.totals(rest_sum),
                scale=self.gradient.scale[block],
            )
            self.weight_sum.add(scaled_product, exponentials, self.rows.hidden[block])
        if self.scaled_ones is not None:
            self.bias_sum.add(product, exponentials.T, self.scaled_ones[block])
        if self.scaled_low_rank_parts is not None:
            by_parts = functools.partial(multiply_parts, self.call)
            self.lora_b_sum.add(by_parts, exponentials.T, self.scaled_low_rank_parts[block])
        elif self.scaled_low_rank is not None:
            wide = exponentials.T.to(self.call.accumulation)
            self.lora_b_sum.add(product, wide, self.scaled_low_rank[block])

    def end(self, columns: slice) -> None:
        """Add the entries of labels and top tokens, then round once."""
        num_rows, low_rank = len(self.gradient.scale), self.rows.low_rank
        if low_rank is not None:
            low_rank = low_rank[:num_rows] * self.call.head.lora_scaling
        ones = None
        if self.bias is not None:
            ones = self.gradient.scale.new_ones(num_rows, 1)
        self.weight_sum.end(columns, self.entries, self.rows.hidden[:num_rows])
        self.bias_sum.end(columns, self.entries, ones)
        self.lora_b_sum.end(columns, self.entries, low_rank)

    def finish(self) -> Gradients:
        """Go from the low-rank product back to its factor, and return everything."""
        hidden = low_rank = lora_a = None
        if self.accumulator is not None:
            hidden, low_rank = hidden_gradient(
                self.call, self.rows, self.gradient, self.top_ids, self.accumulator,
                self.low_rank_accumulator,
            )  # fmt: skip
        if self.needed.lora_a and low_rank is not None:
            wide = self.rows.hidden[: len(low_rank)].to(low_rank.dtype)
            lora_a = wide.new_empty(low_rank.shape[1], wide.shape[1])
            self.call.kernels.product(lora_a, low_rank.T, wide, adds=False)
        return Gradients(
            hidden if self.needed.hidden else None, self.weight, self.bias, lora_a, self.lora_b
        )


def _in_range(rows: Tensor, dtype: torch.dtype) -> tuple[Tensor, Tensor | None]:
    """Return rows in the dtype of products, and the power of two that they were divided by, if any.

    Rows scaled by a small gradient may be tiny, and float16 keeps all digits only of numbers larger
    than 6e-5.
    """
    if dtype != torch.float16 or rows.numel() == 0:
        return rows.to(dtype), None
    _, exponent = torch.frexp(torch.linalg.vector_norm(rows, torch.inf))
    # The largest becomes about 2^13: sums are float32, and what is 2^27 times smaller keeps digits.
    exponent = (exponent - 13).clamp(-100, 100)
    one = rows.new_ones(())
    return (rows * torch.ldexp(one, -exponent)).to(dtype), torch.ldexp(one, exponent)


class _Sum:
    """One gradient of the head, summed for one range of the vocabulary at a time."""

    def __init__(
        self, whole: Tensor | None, dtype: torch.dtype, unit: Tensor | None, *, continues: bool
    ) -> None:
        self.whole, self.dtype, self.unit = whole, dtype, unit
        self.continues = continues  # whether it adds to the values of `whole`
        self.tile: Tensor | None = None
        self.scratch: Tensor | None = None  # of the first range, which is the largest
        self.is_in_place = self.adds = False

    def begin(self, columns: slice) -> None:
        """Start a range, in place if the sum needs neither rounding nor scaling."""
        if self.whole is None:
            return
        part = self.whole[columns]
        is_plain = part.dtype == self.dtype and part.stride(1) == 1
        self.is_in_place = is_plain and not (self.continues and self.unit is not None)
        if self.is_in_place:
            self.tile = part
        else:
            if self.scratch is None:
                self.scratch = torch.empty(part.shape, dtype=self.dtype, device=part.device)
            self.tile = self.scratch[: len(part)]
        self.adds = self.continues and self.is_in_place

    def add(self, product: Callable[..., None], a: Tensor, b: Tensor) -> None:
        """Add ``a @ b``, in units of ``unit``."""
        if self.tile is not None:
            product(self.tile, a, b, adds=self.adds)
            self.adds = True

    def end(self, columns: slice, entries: _Entries, rows: Tensor | None) -> None:
        """Add exact entries, multiples of ``rows``, and write the sum to its gradient."""
        if self.whole is None or self.tile is None or rows is None:
            return
        if not self.adds:
            self.tile.zero_()
        elif self.unit is not None:
            self.tile.mul_(self.unit)
        entries.add(self.tile, columns, rows)
        if self.continues and not self.is_in_place:
            self.whole[columns] += self.tile
        elif not self.is_in_place:
            self.whole[columns] = self.tile
        self.tile = None


def _new_gradients(
    head: Head, needed: Needed
) -> tuple[Tensor | None, Tensor | None, Tensor | None]:
    """Return uninitialised gradients of weight, bias and B."""
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
    """The exact entries of the gradient of the logits, sorted by token."""

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
