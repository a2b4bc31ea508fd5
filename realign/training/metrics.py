"""Metrics of a log line: means over all pairs since the last line, on all ranks."""

from __future__ import annotations

from collections.abc import Callable, Mapping

import torch
from torch import Tensor

from realign_kernels import CELL_NAMES, Objective, RdpoOutput

MAX_PENDING = 1024  # micro-batches; bounds the memory of a run that never logs


class PairMetrics:
    """Sums and weights of every metric since the last log line.

    A micro-batch costs no synchronization: its sums stay on the device and are summed over the
    ranks when they are read. They are added one by one, in float64 and in order, so that a log line
    does not depend on when checkpoints were written.

    Args:
        objective: Objective that determines the metrics.
        sum_over_ranks: Sums a tensor elementwise over the ranks, which call it together.
    """

    def __init__(self, objective: Objective, sum_over_ranks: Callable[[Tensor], Tensor]) -> None:
        self.objective = objective
        self._sum_over_ranks = sum_over_ranks
        self._names: list[str] = []
        self._pending: list[Tensor] = []  # (metrics, 2) each: sum and weight of this rank's pairs
        self._sums: dict[str, tuple[float, float]] = {}  # of all ranks

    def add(self, output: RdpoOutput, *, counted: bool = True) -> None:
        """Add a micro-batch; that of a rank without pairs is not ``counted`` and has no weight.

        Every rank must have added equally many when :meth:`sums` or :meth:`take_means` is called.
        """
        by_pair = metrics_by_pair(output, self.objective)
        self._names = list(by_pair)
        pairs = torch.stack(
            [torch.stack((values.float(), weights.float())) for values, weights in by_pair.values()]
        ).detach()  # (metrics, 2, P)
        sums = torch.stack((pairs.prod(dim=1).sum(-1), pairs[:, 1].sum(-1)), dim=1)
        self._pending.append(sums if counted else torch.zeros_like(sums))
        if len(self._pending) == MAX_PENDING:
            self.sums()

    def sums(self) -> dict[str, tuple[float, float]]:
        """Return the sum and the weight of each metric since the last log line, over all ranks."""
        if self._pending:
            for step in self._sum_over_ranks(torch.stack(self._pending)).tolist():
                for name, (total, weight) in zip(self._names, step, strict=True):
                    before = self._sums.get(name, (0.0, 0.0))
                    self._sums[name] = (before[0] + total, before[1] + weight)
            self._pending.clear()
        return self._sums

    def restore(self, sums: Mapping[str, tuple[float, float]]) -> None:
        """Continue from the :meth:`sums` of a checkpoint."""
        self._pending.clear()
        self._sums = {name: (total, weight) for name, (total, weight) in sums.items()}

    def take_means(self) -> dict[str, float]:
        """Return the means and start over; metrics without a pair are left out."""
        means = {name: total / weight for name, (total, weight) in self.sums().items() if weight}
        self._sums = {}
        return means


def metrics_by_pair(output: RdpoOutput, objective: Objective) -> dict[str, tuple[Tensor, Tensor]]:
    """Return the values and weights of each metric, ``(P,)``; absent cells have weight 0.

    Names and their order depend on the objective alone, so that the ranks' values can be summed.
    """
    is_present = (output.num_tokens > 0).to(output.logps.device)
    loss = output.loss.expand(output.logps.shape[1])
    by_pair = {"loss": (loss, torch.ones_like(loss))}
    if objective.nll_weight > 0:
        nll = -output.logps[0] / output.num_tokens[0].clamp(min=1).to(output.logps)
        by_pair["nll"] = (nll, is_present[0])
    for cell, name in enumerate(CELL_NAMES[: len(output.logps)]):
        by_pair[f"logps/{name}"] = (output.logps[cell], is_present[cell])
        by_pair[f"rewards/{name}"] = (output.rewards[cell], is_present[cell])
    for cell, kind, margins in (
        (1, "text", output.text_margins),
        (2, "image", output.image_margins),
    ):
        if len(output.logps) > cell:
            by_pair[f"rewards/{kind}_margins"] = (margins, is_present[cell])
            by_pair[f"rewards/{kind}_accuracies"] = (margins > 0, is_present[cell])
    return by_pair
