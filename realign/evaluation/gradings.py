"""Scores by the verdicts of a judge: their mean over gradings of the same answers, their bounds if
answers are unjudged, and the names of the judges.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from typing import Any, NamedTuple

import numpy as np

from realign.errors import RefusedError
from realign.evaluation.answer_files import Answered
from realign.evaluation.benchmark import Array, Benchmark, Metrics, Rule
from realign.evaluation.judging import Judging, Reply
from realign.evaluation.rows import Row

Values = Mapping[str, Mapping[str, float | None]]
Scored = list[tuple[Row, str]]


class Grading(NamedTuple):
    """One grading of all answers."""

    worst: Scored
    """Each row with its verdict, which is the worst one if the answer is unjudged."""
    best: Scored
    """The same with the best one."""
    unjudged: list[str]
    """Ids of the answers without a verdict, which the rule does not score."""
    unparsed: list[str]
    """Ids of the answers that the rule scores although the reply about them holds no verdict."""


def read_gradings(benchmark: Benchmark, rule: Rule, answered: Sequence[Answered]) -> list[Grading]:
    """Return every grading that the replies of a judge make up.

    Raises:
        RefusedError: There is no reply at all.
    """
    judging = rule.judging
    assert judging is not None
    asked = [judging.asks_about(item.row, rule.prepare(item.answer)) for item in answered]
    number = max((len(item.replies) for item in answered), default=0)
    ids = [item.row["id"] for item, is_asked in zip(answered, asked, strict=True) if is_asked]
    if ids and all(reply.text is None for item in answered for reply in item.replies):
        _refuse(benchmark, ids)
    gradings = []
    for k in range(max(number, 1)):
        grading = Grading([], [], [], [])
        for item, is_asked in zip(answered, asked, strict=True):
            if not is_asked:
                pair = (rule.prepare(item.answer),) * 2
            else:
                reply = item.replies[k] if k < len(item.replies) else Reply(None)
                pair = _verdicts(judging, item.row, reply.text, grading)
            grading.worst.append((item.row, pair[0]))
            grading.best.append((item.row, pair[1]))
        gradings.append(grading)
    return gradings


def _refuse(benchmark: Benchmark, ids: Sequence[str]) -> None:
    others = [name for name, rule in benchmark.rules.items() if rule.judging is None]
    remedy = f", or pass --rule {others[0]}, which needs no judge" if others else ""
    raise RefusedError(
        f"this rule requires the replies of a judge about {len(ids):,} answers, the files have "
        f"none, first for question {ids[0]}. Have the answers judged with `realign eval judge`"
        f"{remedy}."
    )


def _verdicts(judging: Judging, row: Row, reply: str | None, grading: Grading) -> tuple[str, str]:
    """Return the verdict twice, or the worst and the best one where there is none."""
    verdict = None
    if reply is not None:
        verdict = judging.verdict(row, reply)
        if verdict is None and (verdict := judging.fault(reply)) is not None:
            grading.unparsed.append(row["id"])
    if verdict is None:
        grading.unjudged.append(row["id"])
        return judging.worst(row), judging.best(row)
    return verdict, verdict


def averaged(rule: Rule, gradings: int) -> tuple[Metrics, dict[str, Metrics]]:
    """Return the metrics of a rule and of its splits, as means over gradings whose score vectors
    lie one behind the other.
    """

    def of(metrics: Metrics) -> Metrics:
        def means(sums: Array) -> Mapping[str, Array]:
            apart = sums.reshape(*sums.shape[:-1], gradings, -1)
            return {name: values.mean(axis=-1) for name, values in metrics(apart).items()}

        return means

    return of(rule.metrics), {split: of(found) for split, found in rule.split_metrics.items()}


def joined(sums: Sequence[Mapping[str, Array]]) -> dict[str, Array]:
    """Return the score vectors of several gradings of the same answers, one behind the other."""
    return {split: np.concatenate([one[split] for one in sums], axis=-1) for split in sums[0]}


def ordered_bounds(worst: Values, best: Values) -> dict[str, dict[str, list[float] | None]]:
    """Return the lowest and the highest value of every metric, null where one is not defined."""
    found: dict[str, dict[str, list[float] | None]] = {}
    for split, values in worst.items():
        pairs = {name: (value, best[split][name]) for name, value in values.items()}
        found[split] = {
            name: None if low is None or high is None else sorted((low, high))
            for name, (low, high) in pairs.items()
        }
    return found


def spread(runs: Sequence[Values]) -> dict[str, dict[str, dict[str, float] | None]]:
    """Return the lowest and the highest value of several gradings and their standard deviation
    (that of a sample, with n - 1 below), null where a grading has no value.
    """
    found: dict[str, dict[str, dict[str, float] | None]] = {}
    for split, metrics in runs[0].items():
        found[split] = {}
        for name in metrics:
            values = [value for run in runs if (value := run[split][name]) is not None]
            found[split][name] = None
            if len(values) == len(runs):
                deviation = float(np.std(values, ddof=1))
                found[split][name] = {"min": min(values), "max": max(values), "sd": deviation}
    return found


def judges(answered: Iterable[Answered]) -> list[dict[str, Any]]:
    """Return the judges and their prompts, as far as the files state them, and the number of
    replies of each.
    """
    counts = Counter(
        reply[1:] for item in answered for reply in item.replies if reply.text is not None
    )
    names = Reply._fields[1:]
    return [dict(zip(names, stated, strict=True)) | {"replies": n} for stated, n in counts.items()]


def counted(ids: Iterable[Sequence[str]]) -> dict[str, Any]:
    """Return the ids that are in any of several lists, each once, with their number."""
    distinct = [*dict.fromkeys(found for one in ids for found in one)]
    return {"items": len(distinct), "ids": distinct}
