"""Classes of rows on which computed log-probabilities are inaccurate in different ways.

Each class moves random hidden states along the label's row of the head until the label has given
log-odds, in float64; then everything is rounded.  The rounded numbers are the inputs.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

from benchmarks.head.providers import Inputs

LogOdds = Callable[[Tensor], Tensor]  # of uniform numbers


@dataclass(frozen=True, kw_only=True)
class RowClass:
    """A class of rows with a common property."""

    meaning: str
    logit_std: float = 3.0
    log_odds: LogOdds | None = None  # of the label; None: the label is drawn from the distribution
    logit_softcap: float | None = None


def _between(low: float, high: float) -> LogOdds:
    return lambda uniform: low + (high - low) * uniform


ROW_CLASSES = {
    "ordinary": RowClass(meaning="logits of std 3, labels drawn from their distribution"),
    "peaked": RowClass(meaning="p(label) 0.5 to 0.999", log_odds=_between(0, math.log(999))),
    "confident": RowClass(
        meaning="1 - p(label) from 1e-3 to 1e-7",
        log_odds=_between(math.log(1e3), math.log(1e7)),
    ),
    "unlikely": RowClass(meaning="label 20 to 70 nats down", log_odds=_between(-70, -20)),
    "flat": RowClass(meaning="logits of std 0.05", logit_std=0.05),
    "softcapped": RowClass(
        meaning="logits of std 20, softcap 30", logit_std=20.0, logit_softcap=30.0
    ),
}


def make_rows(
    name: str, num_rows: int, hidden_size: int, vocabulary: int, dtype: torch.dtype, seed: int = 0
) -> Inputs:
    """Draw the rows of a class, on the CPU, rounded to ``dtype``."""
    kind = ROW_CLASSES[name]
    generator = torch.Generator().manual_seed(seed)
    normal = torch.randn(num_rows, hidden_size, generator=generator, dtype=torch.float64)
    weight = torch.randn(vocabulary, hidden_size, generator=generator, dtype=torch.float64)
    weight.mul_(kind.logit_std / hidden_size**0.5)
    hidden = normal
    if kind.log_odds is None:
        logits = hidden @ weight.T
        if kind.logit_softcap is not None:
            logits = kind.logit_softcap * torch.tanh(logits / kind.logit_softcap)
        labels = torch.multinomial(logits.softmax(-1), 1, generator=generator).squeeze(-1)
    else:
        labels = torch.randint(vocabulary, (num_rows,), generator=generator)
        uniform = torch.rand(num_rows, generator=generator, dtype=torch.float64)
        hidden = _with_log_odds(hidden, weight, labels, kind.log_odds(uniform))
    sign = torch.randint(2, (num_rows,), generator=generator) * 2 - 1
    grad = sign * (0.5 + 0.5 * torch.rand(num_rows, generator=generator, dtype=torch.float64))
    return Inputs(hidden.to(dtype), weight.to(dtype), labels, grad, kind.logit_softcap)


def _with_log_odds(hidden: Tensor, weight: Tensor, labels: Tensor, wanted: Tensor) -> Tensor:
    """Move each row along its label's row of the head until log(p / (1 - p)) is ``wanted``."""
    direction = weight[labels]
    direction = direction / direction.square().sum(-1, keepdim=True)
    for _ in range(3):  # moving a row changes its other logits too, a little
        logits = hidden @ weight.T
        label_logits = logits.gather(-1, labels[:, None])
        rest = logits.scatter(-1, labels[:, None], -math.inf).logsumexp(-1)
        hidden = hidden + (wanted - (label_logits.squeeze(-1) - rest))[:, None] * direction
    return hidden
