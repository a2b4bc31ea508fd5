"""Scores stored answers under the named rules of their benchmarks."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from realign.evaluation.benchmark import Array, Rule, ScoredRow, Task
from realign.evaluation.probes import probes
from realign.evaluation.rows import item_key
from realign.evaluation.samples import Answers, sample_answers
from realign.evaluation.statistics import paired_scores
from realign.evaluation.table import SCHEMA
from realign.generation.generator import Answer


def score(
    tasks: Mapping[str, Task], answers: Answers, *, resamples: int, seed: int
) -> dict[str, Any]:
    """Score the answers of several models to the same items.

    Args:
        tasks: By name.
        answers: Model to answer by :func:`~realign.evaluation.rows.item_key`; the first model is
            the baseline.
        resamples: How many draws of the bootstrap.
        seed: Of the draws.
    Returns:
        What ``scores.json`` holds: under ``tasks`` the values of every model by task and rule (see
        :func:`~realign.evaluation.statistics.paired_scores`), under ``table`` what is shown of
        them and how, under ``samples`` answers to look at.
    """
    baseline = next(iter(answers))
    scored: dict[str, Any] = {}
    for name, task in tasks.items():
        by_model = {
            model: [stored[item_key(row)] for row in task.rows] for model, stored in answers.items()
        }
        scored[name] = {
            "benchmark": task.benchmark.title,
            "items": len(task.rows),
            "images": len({row["image"] for row in task.rows if row["image"] is not None}),
            "cluster": task.benchmark.cluster,
            "cut": {model: sum(said.is_cut for said in by_model[model]) for model in by_model},
            "probes": {model: probes(task.benchmark, said) for model, said in by_model.items()},
            "rules": {},
        }
        for rule_name, rule in task.benchmark.rules.items():
            if not rule.scores_constants:  # a judge has to read the answers first
                continue
            scored[name]["rules"][rule_name] = paired_scores(
                {model: _scores_by_cluster(task, rule, said) for model, said in by_model.items()},
                rule.metrics,
                baseline=baseline,
                resamples=resamples,
                seed=seed,
            )
    return {
        "schema": SCHEMA,
        "baseline": baseline,
        "tasks": scored,
        "table": [
            row._asdict()
            for benchmark in dict.fromkeys(task.benchmark for task in tasks.values())
            for row in benchmark.table
            if row.task in tasks
        ],
        "samples": sample_answers(tasks, answers),
    }


def _scores_by_cluster(task: Task, rule: Rule, answers: Sequence[Answer]) -> Array:
    """Return the score vectors of the clusters, in the order of their first rows."""
    clusters: dict[Any, list[ScoredRow]] = {}
    for row, answer in zip(task.rows, answers, strict=True):
        if rule.covers(row):
            scored = (row, rule.score(row, rule.prepare(answer.text)))
            clusters.setdefault(row[rule.cluster or task.benchmark.cluster], []).append(scored)
    return np.array([rule.combine(rows) for rows in clusters.values()], dtype=np.float64)
