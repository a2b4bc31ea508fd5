"""Sums over several gradings of the same answers by a judge."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace

import numpy as np

from realign.errors import RefusedError
from realign.evaluation.benchmark import Rule
from realign.evaluation.cluster_sums import Run, Sums
from realign.evaluation.gradings import averaged


def num_gradings(by_run: Mapping[Run, int]) -> dict[str, int]:
    """Return how often the answers were graded, by rule.

    Args:
        by_run: Gradings of each run, 1 if no judge reads its answers.
    Raises:
        RefusedError: Those of two models were not graded equally often.
    """
    numbers: dict[str, dict[str, int]] = {}
    for run, number in by_run.items():
        numbers.setdefault(run.rule, {})[run.label] = number
    for rule, found in numbers.items():
        if len({*found.values()}) > 1:
            listed = ", ".join(f"{model} {number}" for model, number in found.items())
            raise RefusedError(
                f"answers must be graded equally often for the rule {rule}, got {listed} gradings. "
                "Give as many of each model."
            )
    return {rule: next(iter(found.values())) for rule, found in numbers.items()}


def mean_rule(rule: Rule, gradings: int) -> Rule:
    """Return a rule whose metrics are the means over several gradings."""
    if gradings == 1:
        return rule
    metrics, split_metrics = averaged(rule, gradings)
    return replace(rule, metrics=metrics, split_metrics=split_metrics)


def joined_sums(parts: Sequence[Sums]) -> Sums:
    """Return the sums of several gradings of the same answers, as :func:`averaged` takes them."""
    if len(parts) == 1:
        return parts[0]
    return Sums(
        {
            split: np.hstack([*(part.vectors[split][:, :-2] for part in parts), vectors[:, -2:]])
            for split, vectors in parts[0].vectors.items()  # as many answers in each
        },
        {
            split: {
                metric: units._replace(
                    values=np.mean([part.units[split][metric].values for part in parts], axis=0)
                )
                for metric, units in found.items()
            }
            for split, found in parts[0].units.items()
        },
    )
