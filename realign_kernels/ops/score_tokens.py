"""One call of the head: checks it, chooses a backend, and what its forward has to keep.

Knows neither how scores are computed nor what they are for.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch

from realign_kernels.backends.dispatch import resolve_backend
from realign_kernels.eager.autograd import score_tokens as score_tokens_eagerly
from realign_kernels.eager.reference import RowScores
from realign_kernels.first_order import second_order_witness
from realign_kernels.fused.forward import Keeps
from realign_kernels.fused.results import FusedScores
from realign_kernels.ops.score_tokens_op import score_tokens_op
from realign_kernels.validation import check_head, known_number

if TYPE_CHECKING:
    from torch import Tensor

    from realign_kernels.options import HeadOptions


def score_tokens(
    hidden_states: Tensor,
    lm_head_weight: Tensor,
    labels: Tensor,
    options: HeadOptions,
    *,
    statistics: bool = False,
    top_rows: Tensor | None = None,
    sequence_lengths: Tensor | None = None,
) -> RowScores:
    """Score every position; entries have the shape of ``labels`` and are 0 where those are ignored.

    ``is_top1`` is False there and ids are -1.  Positions of ``top_rows``, of the same shape, are
    scored by their best token that is not the label.  ``sequence_lengths``, on the CPU, sums to the
    number of labels that are not ignored, and saves a GPU's host from waiting for it.
    """
    precision = check_head(hidden_states, lm_head_weight, labels, options)
    backend = resolve_backend(options.backend, hidden_states.device.type)
    if backend == "eager":
        scores = score_tokens_eagerly(
            hidden_states, lm_head_weight, labels, options, precision,
            statistics=statistics or top_rows is not None,
            num_rows=known_number(sequence_lengths, labels.device),
        )  # fmt: skip
        if top_rows is None or scores.top_non_label_logps is None:
            return scores
        return RowScores(torch.where(top_rows, scores.top_non_label_logps, scores.token_logps))
    lora_a, lora_b, lora_scaling = options.lm_head_lora or (None, None, 1.0)
    inputs = (hidden_states, lm_head_weight, options.lm_head_bias, lora_a, lora_b)
    outputs = FusedScores(
        *score_tokens_op(
            hidden_states if labels.ndim else hidden_states[None],
            *inputs[1:],
            labels.reshape(-1),
            None if top_rows is None else top_rows.reshape(-1),
            lora_scaling,
            options.ignore_index,
            [options.logit_scale, options.logit_softcap or 0.0, options.temperature],
            precision.autocast,
            backend,
            _keeps(inputs, options.memory).value,
            statistics,
            sequence_lengths,
            [options.workspace_bytes, options.stash_bytes],
            None if options.group is None else options.group.group_name,
            list(labels.shape),
            second_order_witness(*inputs),
        )
    )
    if not statistics:
        return RowScores(outputs.token_logps.reshape(labels.shape))
    return RowScores(
        **{name: getattr(outputs, name).reshape(labels.shape) for name in RowScores._fields}
    )


def _keeps(inputs: tuple[Tensor | None, ...], memory: str) -> Keeps:
    """Choose what the backward will need, if there is going to be one."""
    needs = [tensor is not None and tensor.requires_grad for tensor in inputs]
    if not torch.is_grad_enabled() or not any(needs):
        return Keeps.NOTHING
    if memory == "recompute":
        return Keeps.NUMBERS
    if memory == "stash":
        return Keeps.STASH
    return Keeps.STASH_IF_IT_FITS if any(needs[1:]) else Keeps.SLOPES
