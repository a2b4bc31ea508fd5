"""The head as operators of torch: schemas, shapes under tracing, derivatives.

The formulas of an operator are in ``fused/``. Rows are compacted inside: tensors that are kept for
a backward have one row per scored label, a size that tracing does not know. Letters: **M**
positions, **N** of them scored, **D** hidden size, **V** vocabulary of this shard, **r** rank.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager, nullcontext
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.nn.functional import pad

from realign_kernels.backends.dispatch import kernels_of, on_device_of, resolve_backend
from realign_kernels.first_order import differentiate_once
from realign_kernels.fused.forward import (
    NO_TOKEN,
    FusedCall,
    Keeps,
    PassResult,
    Rows,
    gather_rows,
    start_pass,
    walk_vocabulary,
)
from realign_kernels.fused.gradients import (
    LogitGradient,
    Needed,
    RowNumbers,
    Upstream,
    by_scoring,
    head_gradients,
    hidden_gradient,
    logit_gradient,
    token_log_probs,
    top_log_probs,
)
from realign_kernels.fused.statistics import statistics
from realign_kernels.head import Head, LogitTransform, Precision
from realign_kernels.ops.schema import operator
from realign_kernels.options import HeadOptions
from realign_kernels.tiling import fitted, row_stride, spans, tile_shape
from realign_kernels.validation import (
    assert_rows_fit,
    check_head,
    check_labels,
    check_no_tangent,
    check_num_scored,
    known_number,
    scored_positions,
)
from realign_kernels.vocabulary import VocabularyShard, locate_shard

# Rows of a frozen head's gradient that are summed at a time, before they are rounded.
_ROWS_AT_A_TIME = 1024


# The dtypes of a backend are constant; torch.compile can trace neither its import nor C++.
@torch.compiler.assume_constant_result  # type: ignore[untyped-decorator]
def _product_dtypes(
    backend: str, computed: torch.dtype, rounded: torch.dtype, is_given: bool
) -> tuple[torch.dtype, torch.dtype]:
    """Return the dtype of operands in products of a backend, and that of exponentials."""
    kernels = kernels_of(backend)
    operand = kernels.operand_dtype(computed, rounded, is_given=is_given)
    return operand, kernels.exponential_dtype(computed, operand)


@torch.compiler.assume_constant_result  # type: ignore[untyped-decorator]
def _stride_multiple(backend: str) -> int:
    """Return the number of elements that the stride of rows of E is a multiple of."""
    multiple: int = getattr(kernels_of(backend), "STRIDE_MULTIPLE", 1)
    return multiple


class HeadArguments(NamedTuple):
    """A head that has been checked, in the form that all its operators take."""

    hidden_states: Tensor
    weight: Tensor
    bias: Tensor | None
    lora_a: Tensor | None
    lora_b: Tensor | None
    lora_scaling: float
    transform: list[float]  # scale, softcap (0: none), temperature
    autocast_dtype: torch.dtype | None  # what the weight is rounded to, tile by tile
    backend: str
    budget: list[int]  # workspace and stash, in bytes
    group_name: str | None
    rounds_factors: bool = True  # whether low-rank factors are rounded too, as by autocast
    accumulates_exactly: bool = False  # of logits, where products truncate sums

    # Methods, since torch.compile of PyTorch 2.10 does not know properties of named tuples.
    def tensors(self) -> tuple[Tensor | None, ...]:
        """Return the inputs that may need a gradient."""
        return self[:5]

    def precision(self) -> Precision:
        """Return the dtypes that are computed in."""
        computed = torch.float64 if self.weight.dtype == torch.float64 else torch.float32
        rounded = self.autocast_dtype or self.weight.dtype
        is_given = self.hidden_states.dtype == self.weight.dtype == rounded
        operand, exponential = _product_dtypes(self.backend, computed, rounded, is_given)
        return Precision(self.autocast_dtype, computed, operand, exponential, self.rounds_factors)

    def stash_width(self) -> int:
        """Return the number of elements of a row of the stash."""
        return row_stride(self.weight.shape[0], _stride_multiple(self.backend))

    def stash_row_bytes(self) -> int:
        """Return the number of bytes of a row of the stash."""
        return self.precision().exponential.itemsize * self.stash_width()

    def vocabulary(self) -> VocabularyShard:
        """Return the part of the vocabulary that the weight holds."""
        size = len(self.weight)
        if self.group_name is None:
            return VocabularyShard(size, start=0, total=size, group=None)
        return locate_shard(size, self.group_name, self.weight.device)


_NUM_HEAD = len(HeadArguments._fields)
_NUM_SCORES, _NUM_DIFFERENTIABLE = 8, 4  # of FusedScores
# Temporaries of the gradient of entropies beside a tile of logits: e, a softcap's slope, a mask.
_ENTROPY_TEMPORARIES = 3


class ScoreArguments(NamedTuple):
    """Labels (M,) to score with hidden states (..., D), and settings of the backward."""

    labels: Tensor
    top_rows: Tensor | None  # (M,) bool: scored by the most probable token that is not the label
    sequence_lengths: Tensor | None  # on the CPU; the number of scored labels, () or in parts
    ignore_index: int
    keeps: str
    with_statistics: bool
    label_shape: list[int]  # of the caller's labels, for messages
    witness: Tensor | None  # of second_order_witness


class FusedScores(NamedTuple):
    """Outputs of the forward, in the order of its schema; empty where they were not asked for."""

    token_logps: Tensor  # (M,), like those down to top_non_label_ids; four are differentiable
    top_non_label_logps: Tensor
    entropy: Tensor
    lse: Tensor
    log_sum_sq_probs: Tensor
    mean_logits: Tensor
    is_top1: Tensor
    top_non_label_ids: Tensor
    slopes: Tensor  # (N, D): derivative of token_logps in the hidden states; not yet rounded
    top_slopes: Tensor  # (N, D): derivative of top_non_label_logps
    positions: Tensor  # (N,) int64, of scored rows
    numbers: Tensor  # (3 or 4, N): floating entries of RowNumbers; empty where slopes are enough
    top_ids: Tensor  # (N,) int64
    stash: Tensor  # (N, stash_width); without rows where exponentials are computed again


def check_call(
    hidden_states: Tensor, lm_head_weight: Tensor, labels: Tensor, options: HeadOptions
) -> HeadArguments:
    """Check the tensors of a call, and choose its backend."""
    autocast = check_head(hidden_states, lm_head_weight, labels, options)
    lora_a, lora_b, lora_scaling = options.lm_head_lora or (None, None, 1.0)
    return HeadArguments(
        hidden_states=hidden_states if labels.ndim else hidden_states[None],
        weight=lm_head_weight,
        bias=options.lm_head_bias,
        lora_a=lora_a,
        lora_b=lora_b,
        lora_scaling=lora_scaling,
        transform=[options.logit_scale, options.logit_softcap or 0.0, options.temperature],
        autocast_dtype=autocast,
        backend=resolve_backend(options.backend, hidden_states.device.type),
        budget=[options.workspace_bytes, options.stash_bytes],
        group_name=None if options.group is None else options.group.group_name,
        accumulates_exactly=options.accumulate == "exact",
        rounds_factors=torch.is_autocast_enabled(hidden_states.device.type),
    )


def score_tokens(
    head: HeadArguments,
    labels: Tensor,
    options: HeadOptions,
    *,
    with_statistics: bool = False,
    top_rows: Tensor | None = None,
    sequence_lengths: Tensor | None = None,
) -> FusedScores:
    """Score every position; the first eight entries have the shape of ``labels``.

    They are 0 where labels are ignored, ``is_top1`` False and ids -1.  Positions of ``top_rows``,
    of the same shape, are scored by the most probable token that is not the label.
    ``sequence_lengths``, on the CPU, sums to the number of labels that are not ignored; with it the
    host does not wait for a GPU.
    """
    arguments = ScoreArguments(
        labels=labels.reshape(-1),
        top_rows=None if top_rows is None else top_rows.reshape(-1),
        sequence_lengths=sequence_lengths,
        ignore_index=options.ignore_index,
        keeps=_keeps(head.tensors(), options.memory).value,
        with_statistics=with_statistics,
        label_shape=list(labels.shape),
        witness=second_order_witness(*head.tensors()),
    )
    scores = FusedScores(*score_tokens_kept(*head, *arguments))
    shaped = scores[: _NUM_SCORES if with_statistics else 1]
    return FusedScores(*(part.reshape(labels.shape) for part in shaped), *scores[len(shaped) :])


def _keeps(tensors: tuple[Tensor | None, ...], memory: str) -> Keeps:
    """Choose what is kept for the backward, if there will be one."""
    needs = [tensor is not None and tensor.requires_grad for tensor in tensors]
    if not torch.is_grad_enabled() or not any(needs):
        return Keeps.NOTHING
    if memory == "recompute":
        return Keeps.NUMBERS
    if memory == "stash":
        return Keeps.STASH
    return Keeps.STASH_IF_IT_FITS if any(needs[1:]) else Keeps.SLOPES


def second_order_witness(*inputs: Tensor | None) -> Tensor | None:
    """Return an empty tensor that depends on the inputs for autograd, without keeping their memory.

    Autograd does not know that a gradient computed in the forward depends on the inputs, and would
    take its derivative for 0. An operator that also takes the witness has one, which is refused.
    """
    if not torch.is_grad_enabled():
        return None
    parts = [part[:0] for part in inputs if part is not None and part.requires_grad]
    if len(parts) < 2:
        return parts[0].clone() if parts else None
    # In one dtype: under autocast, torch.cat refuses a half dtype that is not autocast's.
    return torch.cat([part.reshape(-1).float() for part in parts])


@operator("score_tokens", HeadArguments, ScoreArguments, returns=FusedScores)
def score_tokens_op(*values: Any) -> FusedScores:
    """Score labels by hidden states."""
    head, arguments = HeadArguments(*values[:_NUM_HEAD]), ScoreArguments(*values[_NUM_HEAD:])
    with plain(head.hidden_states):
        vocabulary = head.vocabulary()
        positions, scores = find_rows(
            head, vocabulary, arguments.labels, arguments.ignore_index, arguments.sequence_lengths,
            arguments.label_shape,
        )  # fmt: skip
        num_rows = len(positions)
        call = fused_call(head, vocabulary, num_rows, sums_head_gradient=False)
        if arguments.with_statistics and arguments.keeps != Keeps.NOTHING.value:
            # A workspace that is too small for the backward is refused in the forward.
            fused_call(
                head, vocabulary, num_rows, sums_head_gradient=True, differentiates_entropy=True
            )
        keeps = Keeps(arguments.keeps)
        needed = len(positions) * head.stash_row_bytes()
        if keeps is Keeps.STASH_IF_IT_FITS:
            keeps = Keeps.STASH if needed <= head.budget[1] else Keeps.NUMBERS
        elif keeps is Keeps.STASH and needed > head.budget[1]:
            raise ValueError(
                f"stash_bytes must be >= {needed} for memory='stash' with {len(positions)} answer "
                f"tokens and {len(head.weight)} of vocabulary, got {head.budget[1]}. "
                "Raise it, or pass memory='auto'."
            )
        return _score_rows(call, head.hidden_states, arguments, positions, scores, keeps)


def find_rows(
    head: HeadArguments,
    vocabulary: VocabularyShard,
    labels: Tensor,
    ignore_index: int,
    sequence_lengths: Tensor | None,
    label_shape: list[int],
) -> tuple[Tensor, Tensor | None]:
    """Check labels (M,); return the scored positions, (N,), and, if a kernel ran, zero scores."""
    row_kernels = getattr(kernels_of(head.backend), "ROW_KERNELS", None)
    waits = row_kernels is not None
    num_rows = known_number(sequence_lengths, labels.device, waits)
    is_whole = vocabulary.group is None
    if row_kernels is not None and is_whole and len(labels) <= row_kernels.MOST_POSITIONS:
        found = row_kernels.find_rows(
            labels, ignore_index, len(head.weight), num_rows, head.precision().accumulation
        )
        assert_rows_fit(found.labels_fit, found.number_fits, ignore_index, num_rows)
        return found.positions, found.scores
    check_labels(labels.view(label_shape), ignore_index, vocabulary)
    positions = scored_positions(labels != ignore_index, num_rows)
    if sequence_lengths is not None and sequence_lengths.ndim == 0:
        check_num_scored(int(sequence_lengths), positions)
    return positions, None


def _score_rows(
    call: FusedCall,
    hidden_states: Tensor,
    arguments: ScoreArguments,
    positions: Tensor,
    scores: Tensor | None,
    keeps: Keeps,
) -> FusedScores:
    """Score the rows at ``positions``; ``keeps`` is not STASH_IF_IT_FITS any more."""
    num_rows, labels, with_statistics = len(positions), arguments.labels, arguments.with_statistics
    is_top = None if arguments.top_rows is None else arguments.top_rows[positions]
    tracks_top = with_statistics or is_top is not None
    start = start_pass(
        call, hidden_states, labels, positions, keeps,
        with_statistics=with_statistics, tracks_top=tracks_top,
    )  # fmt: skip
    result = walk_vocabulary(call, start, keeps, with_statistics=with_statistics)
    if call.row_kernels is not None and start.started is not None and not tracks_top:
        if scores is None:
            scores = start.label_logits.new_zeros(len(labels))
        call.row_kernels.finish_rows(
            call.head, call.transform, start.started, positions, result.accumulator, scores
        )
        slopes = scores[:0].clone() if result.accumulator is None else result.accumulator
        return _scores_of(
            call, {"token_logps": scores}, (slopes[:num_rows], scores.new_empty(0)), positions,
            result, start.started.numbers, None, keeps,
        )  # fmt: skip
    rows, numbers = start.rows, RowNumbers.of(result, num_rows)
    logps = token_log_probs(numbers)
    outputs: dict[str, Tensor] = {}

    def spread(name: str, rows: Tensor, fill: float = 0) -> None:
        """Write the results of rows to the positions of their labels."""
        outputs[name] = rows.new_full((len(labels),), fill)
        outputs[name][positions] = rows

    if with_statistics:
        found = statistics(result, numbers, logps, labels[positions], call.vocabulary)
        for name, part in found._asdict().items():
            spread(name, part, -1 if name == "top_non_label_ids" else 0)
        top_logps = top_log_probs(numbers).masked_fill(logps.isnan(), torch.nan)
        spread("top_non_label_logps", top_logps)
    slopes, top_slopes = logps.new_empty(0), logps.new_empty(0)
    if keeps is Keeps.SLOPES:
        slopes, top_slopes = _slopes(call, rows, numbers, result, is_top, with_statistics)
    if is_top is not None:
        logps = torch.where(is_top, top_log_probs(numbers), logps)
    spread("token_logps", logps)
    parts = [part for part in numbers[:4] if part is not None]
    return _scores_of(
        call, outputs, (slopes, top_slopes), positions, result, torch.stack(parts), numbers.top_ids,
        keeps,
    )  # fmt: skip


def _scores_of(
    call: FusedCall,
    outputs: dict[str, Tensor],
    slopes: tuple[Tensor, Tensor],
    positions: Tensor,
    result: PassResult,
    numbers: Tensor,
    top_ids: Tensor | None,
    keeps: Keeps,
) -> FusedScores:
    """Return the outputs of the operator, of which none may be a view of another."""
    scores, num_rows = outputs["token_logps"], len(positions)
    # The gradients of entropy and lse are computed in the backward, from the numbers.
    is_saved = keeps in (Keeps.STASH, Keeps.NUMBERS) or (top_ids is not None and "lse" in outputs)
    num_saved = num_rows if is_saved and keeps is not Keeps.NOTHING else 0
    dtypes = {"is_top1": torch.bool, "top_non_label_ids": torch.int64}
    for name in FusedScores._fields[1:_NUM_SCORES]:
        if name not in outputs:
            outputs[name] = scores.new_empty(0, dtype=dtypes.get(name))
    stash = result.stash
    if stash is None:
        stash = scores.new_empty(0, call.stash_width, dtype=call.exponential)
    return FusedScores(
        **outputs,
        slopes=slopes[0],
        top_slopes=slopes[1],
        positions=positions.new_empty(0) if keeps is Keeps.NOTHING else positions,
        numbers=numbers[:, :num_saved].contiguous(),
        top_ids=positions.new_empty(0) if top_ids is None else top_ids[:num_saved].clone(),
        stash=stash[:num_rows],
    )


def _slopes(
    call: FusedCall,
    rows: Rows,
    numbers: RowNumbers,
    result: PassResult,
    is_top: Tensor | None,
    with_statistics: bool,
) -> tuple[Tensor, Tensor]:
    """Return derivatives with respect to hidden states: of a row's score, and of its top token."""
    accumulator, low_rank = result.accumulator, result.low_rank_accumulator
    assert accumulator is not None
    ones = torch.ones_like(numbers.shift)

    def slopes_of(
        grad_label: Tensor, grad_top: Tensor | None, total: Tensor, low_rank_total: Tensor | None
    ) -> Tensor:
        gradient = logit_gradient(numbers, call.transform, Upstream(grad_label, grad_top))
        hidden, _ = hidden_gradient(call, rows, gradient, numbers.top_ids, total, low_rank_total)
        return hidden

    top_slopes = accumulator.new_empty(0)
    if with_statistics:
        low_rank_copy = None if low_rank is None else low_rank.clone()
        top_slopes = slopes_of(torch.zeros_like(ones), ones, accumulator.clone(), low_rank_copy)
    grad_label, grad_top = (ones, None) if is_top is None else by_scoring(is_top, ones)
    return slopes_of(grad_label, grad_top, accumulator, low_rank), top_slopes


@score_tokens_op.register_fake
def _score_tokens_fake(*values: Any) -> FusedScores:
    head, arguments = HeadArguments(*values[:_NUM_HEAD]), ScoreArguments(*values[_NUM_HEAD:])
    with_statistics, keeps = arguments.with_statistics, Keeps(arguments.keeps)
    number, hidden_size = head.precision().accumulation, head.weight.shape[1]
    tracks_top = with_statistics or arguments.top_rows is not None

    def empty(dtype: torch.dtype, is_used: bool, *shape: Any) -> Tensor:
        return head.hidden_states.new_empty(shape if is_used else (0,), dtype=dtype)

    def per_position(dtype: torch.dtype) -> Tensor:
        return empty(dtype, with_statistics, arguments.labels.shape[0])

    num_scored: Any = 0
    num_stashed: Any = 0
    if keeps is not Keeps.NOTHING:
        num_scored = torch.library.get_ctx().new_dynamic_size()
    if keeps is Keeps.STASH:
        num_stashed = num_scored
    elif keeps is Keeps.STASH_IF_IT_FITS:
        num_stashed = torch.library.get_ctx().new_dynamic_size()
    has_slopes = keeps is Keeps.SLOPES
    num_saved = 0 if has_slopes and not with_statistics else num_scored
    return FusedScores(
        token_logps=empty(number, True, arguments.labels.shape[0]),
        top_non_label_logps=per_position(number),
        entropy=per_position(number),
        lse=per_position(number),
        log_sum_sq_probs=per_position(number),
        mean_logits=per_position(number),
        is_top1=per_position(torch.bool),
        top_non_label_ids=per_position(torch.int64),
        slopes=empty(number, has_slopes, num_scored, hidden_size),
        top_slopes=empty(number, has_slopes and with_statistics, num_scored, hidden_size),
        positions=empty(torch.int64, True, num_scored),
        numbers=empty(number, True, 4 if tracks_top else 3, num_saved),
        top_ids=empty(torch.int64, True, num_saved if tracks_top else 0),
        stash=empty(head.precision().exponential, True, num_stashed, head.stash_width()),
    )


class BackwardArguments(NamedTuple):
    """Inputs of the backward besides the head: upstream gradients, and tensors that were kept."""

    grad_logps: Tensor | None  # (M,)
    grad_top_logps: Tensor | None
    grad_entropy: Tensor | None
    grad_lse: Tensor | None
    entropy: Tensor | None  # (M,), where it has a gradient
    labels: Tensor
    top_rows: Tensor | None
    positions: Tensor
    numbers: Tensor
    top_ids: Tensor
    stash: Tensor
    needed: list[bool]


class HeadGradients(NamedTuple):
    """Gradients in the dtypes of the inputs; empty where not needed."""

    hidden_states: Tensor
    weight: Tensor
    bias: Tensor
    lora_a: Tensor
    lora_b: Tensor


@operator("score_tokens_backward", HeadArguments, BackwardArguments, returns=HeadGradients)
def score_tokens_backward_op(*values: Any) -> HeadGradients:
    """Differentiate the scores of the forward."""
    head, kept = HeadArguments(*values[:_NUM_HEAD]), BackwardArguments(*values[_NUM_HEAD:])
    positions = kept.positions
    with plain(head.hidden_states):
        sums_head = any(kept.needed[1:])
        call = fused_call(
            head,
            head.vocabulary(),
            len(positions),
            sums_head_gradient=sums_head,
            differentiates_entropy=kept.grad_entropy is not None,
        )
        rows = gather_rows(call, head.hidden_states, kept.labels, positions)
        has_stash = len(kept.stash) == len(positions) > 0 and kept.grad_entropy is None
        tracks_top = len(kept.numbers) == 4
        row_kernels = call.row_kernels
        grad_logps = None if tracks_top or row_kernels is None else kept.grad_logps
        # Padding makes a row's gradient independent of the number of other rows; a trained head
        # does without it.
        is_padded = not (sums_head or has_stash or grad_logps is not None)
        num_empty = len(rows.ids) - len(positions) if is_padded else 0
        # Hooks on saved tensors may return them in another layout.
        numbers, top_ids = kept.numbers.contiguous(), kept.top_ids.contiguous()
        if num_empty > 0:
            numbers = pad(numbers, (0, num_empty))
            top_ids = pad(top_ids, (0, num_empty), value=NO_TOKEN)
        row_numbers = RowNumbers(
            *numbers[:3], *((numbers[3], top_ids) if tracks_top else (None, None))
        )

        def per_row(grad: Tensor | None) -> Tensor:
            if grad is None or grad.numel() == 0:
                return numbers.new_zeros(numbers.shape[1])
            return pad(grad[positions].to(numbers.dtype), (0, num_empty))

        if row_kernels is not None and grad_logps is not None:
            graded = row_kernels.grade_rows(call.transform, numbers, grad_logps, positions)
            gradient = LogitGradient(*graded, None)
        else:
            grad_label, grad_top = per_row(kept.grad_logps), None
            if tracks_top:
                grad_top = per_row(kept.grad_top_logps)
            if kept.top_rows is not None:
                is_top = pad(kept.top_rows[positions], (0, num_empty))
                grad_label, grad_top = by_scoring(is_top, grad_label)
            upstream = Upstream(
                grad_label,
                grad_top,
                None if kept.grad_lse is None else per_row(kept.grad_lse),
                None if kept.grad_entropy is None else per_row(kept.grad_entropy),
            )
            entropy = None if kept.entropy is None else per_row(kept.entropy)
            gradient = logit_gradient(row_numbers, call.transform, upstream, entropy)
        stash = kept.stash if has_stash else None
        grads = head_gradients(call, rows, row_numbers, gradient, stash, Needed(*kept.needed))
        grad_hidden = None
        if grads.hidden is not None and row_kernels is not None:
            grad_hidden = head.hidden_states.new_empty(head.hidden_states.shape)
            rows_of_grad = grad_hidden.view(-1, grad_hidden.shape[-1])
            row_kernels.spread_rows(None, grads.hidden[: len(positions)], positions, rows_of_grad)
        elif grads.hidden is not None:
            grad_hidden = head.hidden_states.new_zeros(head.hidden_states.shape)
            rows_of_grad = grad_hidden.view(-1, grad_hidden.shape[-1])
            rows_of_grad[positions] = grads.hidden[: len(positions)].to(grad_hidden.dtype)
        given = (grad_hidden, grads.weight, grads.bias, grads.lora_a, grads.lora_b)
        return HeadGradients(
            *(
                head.hidden_states.new_empty(0) if grad is None or like is None
                else grad.to(like.dtype)
                for grad, like in zip(given, head.tensors(), strict=True)
            )
        )  # fmt: skip


@score_tokens_backward_op.register_fake
def _score_tokens_backward_fake(*values: Any) -> HeadGradients:
    head, kept = HeadArguments(*values[:_NUM_HEAD]), BackwardArguments(*values[_NUM_HEAD:])
    return HeadGradients(
        *(
            head.hidden_states.new_empty(0) if like is None or not is_needed
            else torch.empty_like(like, memory_format=torch.contiguous_format)
            for like, is_needed in zip(head.tensors(), kept.needed, strict=True)
        )
    )  # fmt: skip


class SlopeArguments(NamedTuple):
    """Derivatives computed in the forward, and the upstream gradients that multiply them."""

    grad_logps: Tensor | None
    grad_top_logps: Tensor | None
    slopes: Tensor
    top_slopes: Tensor
    positions: Tensor
    shape: list[int]
    dtype: torch.dtype
    witness: Tensor | None
    backend: str


@operator("scale_slopes", SlopeArguments, returns="Tensor")
def scale_slopes_op(*values: Any) -> Tensor:
    """Return the gradient of the hidden states from derivatives computed in the forward.

    It is a separate operator so that its derivative, which would be silently wrong, is refused.
    """
    given = SlopeArguments(*values)
    positions, row_kernels = (
        given.positions,
        getattr(kernels_of(given.backend), "ROW_KERNELS", None),
    )
    if row_kernels is not None and given.grad_logps is not None and given.top_slopes.numel() == 0:
        grad = given.slopes.new_empty(given.shape, dtype=given.dtype)
        rows = grad.view(-1, given.shape[-1])
        with on_device_of(grad):
            row_kernels.spread_rows(given.grad_logps, given.slopes, positions, rows)
        return grad
    grad = torch.zeros(given.shape, dtype=given.dtype, device=positions.device)
    rows_of_grad = grad.view(-1, given.shape[-1])
    terms = [
        (upstream[positions][:, None], slope)
        for upstream, slope in (
            (given.grad_logps, given.slopes),
            (given.grad_top_logps, given.top_slopes),
        )
        if upstream is not None and slope.numel() > 0
    ]
    for block in spans(len(positions) if terms else 0, _ROWS_AT_A_TIME):
        upstream, slope = terms[0]
        rows = upstream[block] * slope[block]
        for upstream, slope in terms[1:]:
            rows.addcmul_(upstream[block], slope[block])
        rows_of_grad[positions[block]] = rows.to(given.dtype)
        del rows
    return grad


@scale_slopes_op.register_fake
def _scale_slopes_fake(*values: Any) -> Tensor:
    given = SlopeArguments(*values)
    return given.slopes.new_empty(given.shape, dtype=given.dtype)


@contextmanager
def plain(tensor: Tensor) -> Iterator[None]:
    """Run without autograd and autocast, so that all rounding is explicit."""
    device_type = tensor.device.type
    autocast: Any = nullcontext()
    if torch.is_autocast_enabled(device_type):
        autocast = torch.autocast(device_type, enabled=False)
    with on_device_of(tensor), torch.no_grad(), autocast:
        yield


def fused_call(
    head: HeadArguments,
    vocabulary: VocabularyShard,
    num_rows: int,
    *,
    sums_head_gradient: bool,
    differentiates_entropy: bool = False,
) -> FusedCall:
    """Collect the settings that are fixed over a call; both flags reserve scratch memory."""
    kernels, precision = kernels_of(head.backend), head.precision()
    weight, lora_a = head.weight, head.lora_a
    fits = getattr(kernels, "FITS_TILES", False)
    shape = tile_shape(
        fitted(kernels.LARGEST_TILE, num_rows if fits else None),
        weight.shape[1],
        0 if lora_a is None else lora_a.shape[0],
        (
            precision.accumulation.itemsize,
            precision.operand.itemsize,
            precision.exponential.itemsize,
        ),
        head.budget[0],
        temporaries=max(kernels.TEMPORARIES, _ENTROPY_TEMPORARIES if differentiates_entropy else 0),
        casts_head=precision.copies(weight.dtype),
        sums_head_gradient=sums_head_gradient,
    )
    factor = None if lora_a is None else precision.of_factor(lora_a)
    scale, softcap, temperature = head.transform
    return FusedCall(
        head=Head(weight, head.bias, factor, head.lora_b, head.lora_scaling, precision),
        transform=LogitTransform(scale, softcap or None, temperature),
        vocabulary=vocabulary,
        shape=shape,
        kernels=kernels,
        accumulates_exactly=head.accumulates_exactly,
    )


def _setup_context(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, ...]) -> None:
    head, arguments = HeadArguments(*inputs[:_NUM_HEAD]), ScoreArguments(*inputs[_NUM_HEAD:])
    scores = FusedScores(*output)
    ctx.keeps = Keeps(arguments.keeps)
    ctx.options = head[5:]
    ctx.set_materialize_grads(False)
    ctx.mark_non_differentiable(*output[_NUM_DIFFERENTIABLE:])
    ctx.has_statistics = arguments.with_statistics
    slopes: tuple[Tensor | None, ...] = ()
    if ctx.keeps is Keeps.SLOPES:
        slopes = scores.slopes, scores.top_slopes, arguments.witness
        ctx.hidden = list(head.hidden_states.shape), head.hidden_states.dtype
        ctx.backend = head.backend
        if not arguments.with_statistics:
            # The backward does not need the hidden states.
            ctx.save_for_backward(*slopes, scores.positions)
            return
    entropy = scores.entropy if arguments.with_statistics else None
    ctx.save_for_backward(
        *slopes, scores.positions, scores.numbers, scores.top_ids, scores.stash, *head.tensors(),
        arguments.labels, arguments.top_rows, entropy,
    )  # fmt: skip


def _backward(
    ctx: Any,
    grad_logps: Tensor | None,
    grad_top_logps: Tensor | None = None,
    grad_entropy: Tensor | None = None,
    grad_lse: Tensor | None = None,
    *_: None,
) -> tuple[Tensor | None, ...]:
    nothing = (None,) * (_NUM_HEAD + len(ScoreArguments._fields))
    if not ctx.has_statistics:
        # Outputs that were not asked for are empty, and so are their gradients.
        grad_top_logps = grad_entropy = grad_lse = None
    upstream = (grad_logps, grad_top_logps, grad_entropy, grad_lse)
    if all(grad is None for grad in upstream):
        return nothing
    for grad in upstream:
        check_no_tangent("the upstream gradient", grad)
    assert ctx.keeps is not Keeps.NOTHING  # or gradients would silently be zeros
    needed = list(ctx.needs_input_grad[:5])
    # Read once: hooks of checkpointing and offloading unpack at every access.
    saved = list(ctx.saved_tensors)
    if ctx.keeps is Keeps.SLOPES:
        slopes, top_slopes, witness, *saved = saved
        if grad_entropy is None and grad_lse is None:
            grad = scale_slopes_op(
                grad_logps, grad_top_logps, slopes, top_slopes, saved[0], *ctx.hidden, witness,
                ctx.backend,
            )  # fmt: skip
            return (grad, *nothing[1:])
    positions, numbers, top_ids, stash, *rest = saved
    tensors, (labels, top_rows, entropy) = rest[:5], rest[5:]
    grads = score_tokens_backward_op(
        *tensors, *ctx.options, *upstream, None if grad_entropy is None else entropy, labels,
        top_rows, positions, numbers, top_ids, stash, needed,
    )  # fmt: skip
    gradients = zip(grads, needed, strict=True)
    return (*(grad if is_needed else None for grad, is_needed in gradients), *nothing[5:])


score_tokens_op.register_autograd(_backward, setup_context=_setup_context)


class _KeptScores(torch.autograd.Function):
    """The operator with its derivative, for eager code.

    For an operator with a registered derivative, torch reads the operator's schema at every call,
    which takes the host 0.1 ms for twenty arguments.
    """

    @staticmethod
    def forward(ctx: Any, *values: Any) -> Any:
        output = score_tokens_op(*values)
        _setup_context(ctx, values, output)
        return output

    backward = staticmethod(_backward)


def score_tokens_kept(*values: Any) -> Any:
    """Call the operator, and keep the tensors that its derivative needs."""
    requires_grad = any(part is not None and part.requires_grad for part in values[:5])
    if requires_grad and torch.is_grad_enabled() and not torch.compiler.is_compiling():
        return _KeptScores.apply(*values)
    return score_tokens_op(*values)


for _operator in (score_tokens_backward_op, scale_slopes_op):
    differentiate_once(_operator)
