"""From the sums of a pass to log-probabilities, statistics, and the gradient by logits of a row.

Elementwise in rows; knows no tensor of the size of the hidden states.  Letters as in ``fused.py``.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, NamedTuple

import torch
from torch import Tensor

from realign_kernels.fused.forward import NO_TOKEN, PassResult

if TYPE_CHECKING:
    from realign_kernels.options import LogitTransform
    from realign_kernels.vocabulary import VocabularyShard


class RowNumbers(NamedTuple):
    """What a row leaves behind, (N,) each: enough for its results and its gradients.

    ``rest_sum`` is relative to ``shift`` and leaves out the label and, where it is tracked, the top
    token, whose local id may lie outside of this shard.
    """

    label_logits: Tensor
    shift: Tensor
    rest_sum: Tensor
    top_logits: Tensor | None
    top_ids: Tensor | None

    @classmethod
    def of(cls, result: PassResult, num_rows: int) -> RowNumbers:
        """Take them from a pass, without the empty rows behind."""
        state = result.state
        parts = (
            result.label_logits, state.shift, state.rest_sum, state.top_logits, state.top_ids
        )  # fmt: skip
        return cls(*(None if part is None else part[:num_rows] for part in parts))  # type: ignore[arg-type]

    @property
    def log_label(self) -> Tensor:
        """Logit of the label above the shift, or above itself where there is no other."""
        base = torch.where(self.shift == -torch.inf, self.label_logits, self.shift)
        # Equal infinities are a row without any finite logit: NaN, as it should be.
        return self.label_logits - base

    @property
    def excess(self) -> Tensor:
        """What to take off logarithms so that the label's exponential cannot overflow.

        0 where the shift started at the label, which is everywhere but in float16.
        """
        return self.log_label.clamp(min=0)

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
    """The gradient by raw logits of every row: ``scale * E`` but at the label and the top token."""

    scale: Tensor
    at_label: Tensor
    at_top: Tensor | None


def token_log_probs(numbers: RowNumbers) -> Tensor:
    """Return log p(label), (N,); NaN where the label is no token or its logit is infinite."""
    logps = log_share(numbers.log_label, numbers.rest_sum + numbers.top)
    return torch.where(numbers.label_logits == torch.inf, torch.nan, logps)


def top_log_probs(numbers: RowNumbers) -> Tensor:
    """Return log p(top), (N,); -inf where there is no other token."""
    assert numbers.log_top is not None
    return _log_share_beside_label(numbers, numbers.log_top, numbers.rest_sum)


def log_share(log_part: Tensor, others: Tensor) -> Tensor:
    """Return ``log(part / (part + others))``, exact where either is far larger."""
    part = torch.exp(log_part)
    large = -torch.log1p(others * torch.exp(-log_part))
    return torch.where(log_part >= 0, large, log_part - torch.log(part + others))


def _log_share_beside_label(numbers: RowNumbers, log_part: Tensor, rest: Tensor) -> Tensor:
    """Return ``log(part / (part + rest + label))``."""
    excess = numbers.excess
    others = rest * torch.exp(-excess) + torch.exp(numbers.log_label - excess)
    return log_share(log_part - excess, others)


def logit_gradient(
    numbers: RowNumbers, transform: LogitTransform, grad_label: Tensor, grad_top: Tensor | None
) -> LogitGradient:
    """Differentiate ``grad_label * log p(label) + grad_top * log p(top)`` by the raw logits."""
    decay = torch.exp(-numbers.excess)
    label = torch.exp(numbers.log_label - numbers.excess)
    top, rest = decay * numbers.top, decay * numbers.rest_sum
    total = label + top + rest
    grad = grad_label if grad_top is None else grad_label + grad_top
    # Products of what is left: 1 - p is never taken.
    at_label = grad_label * ((rest + top) / total)
    at_top = None
    if grad_top is not None:
        at_label = at_label - grad_top * (label / total)
    if numbers.top_logits is not None:
        at_top = -grad_label * (top / total)
        if grad_top is not None:
            at_top = at_top + grad_top * ((rest + label) / total)
        at_top = at_top * transform.slope(numbers.top_logits)
        at_top = torch.where(numbers.top_logits == -torch.inf, 0.0, at_top)
    return LogitGradient(
        scale=-grad * decay / total,
        at_label=at_label * transform.slope(numbers.label_logits),
        at_top=at_top,
    )


def by_scoring(is_top: Tensor, grad: Tensor) -> tuple[Tensor, Tensor]:
    """Split the gradient of what rows are scored by into that of the label and of the top token."""
    return torch.where(is_top, 0.0, grad), torch.where(is_top, grad, 0.0)


class Statistics(NamedTuple):
    """Entries of ``LogprobStats`` that carry no gradient, (N,) each."""

    entropy: Tensor
    log_sum_sq_probs: Tensor
    mean_logits: Tensor
    is_top1: Tensor
    top_non_label_ids: Tensor


def statistics(
    result: PassResult,
    numbers: RowNumbers,
    token_logps: Tensor,
    labels: Tensor,
    vocabulary: VocabularyShard,
) -> Statistics:
    """Turn sums over the vocabulary into statistics of the distribution."""
    num_rows = len(token_logps)

    def rows(tensor: Tensor | None) -> Tensor:
        assert tensor is not None  # a pass with statistics fills in all of them
        return tensor[:num_rows]

    log_top = numbers.log_top
    assert log_top is not None
    top = torch.exp(log_top)
    rest = numbers.rest_sum + top
    entropy_sum = rows(result.state.rest_entropy_sum) + torch.where(top == 0, 0.0, -top * log_top)
    square_sum = rows(result.state.rest_square_sum) + top.square()
    label = torch.exp(numbers.log_label)
    log_total = torch.where(
        numbers.log_label >= 0,
        numbers.log_label + torch.log1p(rest * torch.exp(-numbers.log_label)),
        torch.log(label + rest),
    )
    log_rest = torch.log(rest)
    rest_logps = _log_share_beside_label(numbers, log_rest, torch.zeros_like(rest))
    has_rest = rest > 0
    rest_entropy = torch.where(has_rest, log_rest + entropy_sum / rest, 0.0)
    label_logits = rows(result.state.label_logits)
    top_ids = _global_top_ids(numbers, labels, vocabulary)
    top_logits = rows(result.state.top_logits)
    is_first_of_equals = (label_logits == top_logits) & (labels < top_ids)
    return Statistics(
        entropy=_minus_p_log_p(token_logps)
        + _minus_p_log_p(rest_logps)
        + torch.exp(rest_logps) * rest_entropy,
        log_sum_sq_probs=torch.logaddexp(2 * token_logps, torch.log(square_sum) - 2 * log_total),
        mean_logits=rows(result.state.logit_sum) / vocabulary.total,
        is_top1=(label_logits > top_logits) | is_first_of_equals,
        top_non_label_ids=top_ids,
    )


def _global_top_ids(numbers: RowNumbers, labels: Tensor, vocabulary: VocabularyShard) -> Tensor:
    """Return ids in the whole vocabulary; the lowest other one where no logit is finite."""
    assert numbers.top_ids is not None
    assert numbers.top_logits is not None
    lowest = torch.where(labels == 0, 1, 0)
    lowest = torch.where(lowest < vocabulary.total, lowest, NO_TOKEN)
    has_top = numbers.top_logits > -torch.inf
    return torch.where(has_top, numbers.top_ids + vocabulary.start, lowest)


def _minus_p_log_p(log_p: Tensor) -> Tensor:
    return torch.where(log_p == -torch.inf, 0.0, -log_p * torch.exp(log_p))
