"""The eager backend: checks a call, drops ignored rows, binds ``reference.py`` to autograd.

What the backward saves is the inputs and a handful of numbers a row; logits are recomputed tile by
tile.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
from torch import Tensor

from realign_kernels.eager.gradients import HeadGradients, factor_gradient
from realign_kernels.eager.reference import (
    NO_TOKEN,
    Rows,
    RowScores,
    label_gap,
    score_rows,
    sum_rows,
)
from realign_kernels.first_order import once
from realign_kernels.head import Head
from realign_kernels.options import HeadOptions, LogitTransform, Precision
from realign_kernels.tiling import TileShape, tile_shape
from realign_kernels.validation import check_labels, scored_positions
from realign_kernels.vocabulary import VocabularyShard, locate_shard


@dataclass(frozen=True, slots=True)
class _Call:
    """Everything about one call that is not a differentiable tensor."""

    transform: LogitTransform
    precision: Precision
    vocabulary: VocabularyShard
    shape: TileShape
    lora_scaling: float
    statistics: bool

    def head(
        self, weight: Tensor, bias: Tensor | None, lora_a: Tensor | None, lora_b: Tensor | None
    ) -> Head:
        """Put the head together inside forward or backward."""
        factor = None if lora_a is None else self.precision.of_factor(lora_a)
        return Head(weight, bias, factor, lora_b, self.lora_scaling, self.precision)


def score_tokens(
    hidden_states: Tensor,
    lm_head_weight: Tensor,
    labels: Tensor,
    options: HeadOptions,
    precision: Precision,
    *,
    statistics: bool,
    num_rows: int | None,
) -> RowScores:
    """Score every position of a call that has been checked; shapes as in ``token_scores.py``."""
    lora_a, lora_b, lora_scaling = options.lm_head_lora or (None, None, 1.0)
    call = _Call(
        transform=options.transform,
        precision=precision,
        vocabulary=locate_shard(lm_head_weight.shape[0], options.group, labels.device),
        shape=tile_shape(
            hidden_size=hidden_states.shape[-1],
            rank=0 if lora_a is None else lora_a.shape[0],
            itemsize=precision.accumulation.itemsize,
            workspace_bytes=options.workspace_bytes,
        ),
        lora_scaling=lora_scaling,
        statistics=statistics,
    )
    check_labels(labels, options.ignore_index, call.vocabulary)
    shape = labels.shape
    if labels.ndim == 0:
        hidden_states, labels = hidden_states.unsqueeze(0), labels.unsqueeze(0)
    flat = scored_positions(labels.reshape(-1) != options.ignore_index, num_rows)
    positions = torch.unravel_index(flat, labels.shape)
    apply: Any = _EagerScores.apply
    scores = apply(
        call,
        labels[positions],
        positions,
        hidden_states,
        lm_head_weight,
        options.lm_head_bias,
        lora_a,
        lora_b,
    )
    return RowScores(*(_spread(score, positions, labels.shape).reshape(shape) for score in scores))


def _spread(score: Tensor, positions: tuple[Tensor, ...], shape: torch.Size) -> Tensor:
    """Put row results back where their labels are; differentiable."""
    fill = NO_TOKEN if score.dtype == torch.int64 else 0
    return score.new_full(shape, fill).index_put(positions, score)


class _Saved(NamedTuple):
    """What the forward leaves for the backward: inputs, and numbers a row."""

    labels: Tensor
    gap: Tensor
    rest_max: Tensor
    rest_sum: Tensor
    top_ids: Tensor | None
    hidden_states: Tensor
    weight: Tensor
    bias: Tensor | None
    lora_a: Tensor | None
    lora_b: Tensor | None


class _EagerScores(torch.autograd.Function):
    """Rows in, scores out; first order only."""

    @staticmethod
    def forward(
        ctx: Any,
        call: _Call,
        labels: Tensor,
        positions: tuple[Tensor, ...],
        hidden_states: Tensor,
        weight: Tensor,
        bias: Tensor | None,
        lora_a: Tensor | None,
        lora_b: Tensor | None,
    ) -> tuple[Tensor, ...]:
        with torch.autocast(hidden_states.device.type, enabled=False):
            sums = sum_rows(
                Rows(hidden_states, positions, labels),
                call.head(weight, bias, lora_a, lora_b),
                call.transform,
                call.vocabulary,
                call.shape,
                statistics=call.statistics,
            )
            gap = label_gap(sums, labels, call.vocabulary)
            scores = score_rows(sums, gap, labels, call.vocabulary)
        row_numbers = (labels, gap, sums.rest_max, sums.rest_sum, sums.top_ids)
        inputs = (hidden_states, weight, bias, lora_a, lora_b)
        ctx.call = call
        ctx.save_for_backward(*_Saved(*row_numbers, *inputs), *positions)
        ctx.set_materialize_grads(False)
        present = tuple(score for score in scores if score is not None)
        ctx.mark_non_differentiable(*present[2:])
        return present

    @staticmethod
    def backward(
        ctx: Any, grad_token_logps: Tensor | None, grad_top_logps: Tensor | None = None, *_: None
    ) -> tuple[Tensor | None, ...]:
        call: _Call = ctx.call
        # Read once: hooks of checkpointing and offloading unpack at every access.
        saved_tensors, num_saved = ctx.saved_tensors, len(_Saved._fields)
        saved, positions = _Saved(*saved_tensors[:num_saved]), saved_tensors[num_saved:]
        if grad_token_logps is None:
            grad_token_logps = torch.zeros_like(saved.gap)
        # Backward may be called inside autocast, which would round the products below.
        with torch.no_grad(), torch.autocast(saved.hidden_states.device.type, enabled=False):
            factors = factor_gradient(*saved[:5], grad_token_logps, grad_top_logps)
            grads = HeadGradients(
                Rows(saved.hidden_states, positions, saved.labels),
                call.head(saved.weight, saved.bias, saved.lora_a, saved.lora_b),
                ctx.needs_input_grad[3:],
            )
            grads.run(factors, call.transform, call.vocabulary, call.shape)
        grad_hidden = None
        if grads.hidden is not None:
            grad_hidden = saved.hidden_states.new_zeros(saved.hidden_states.shape)
            grad_hidden[positions] = grads.hidden.to(grad_hidden.dtype)
        grad_lora_a = None
        if grads.lora_a is not None and saved.lora_a is not None:
            grad_lora_a = grads.lora_a.to(saved.lora_a.dtype)
        inputs = list(saved[-5:])
        gradients = [grad_hidden, grads.weight, grads.bias, grad_lora_a, grads.lora_b]
        return None, None, None, *once(gradients, inputs)
