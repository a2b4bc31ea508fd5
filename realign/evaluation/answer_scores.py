"""Scores of answers that any program wrote, by a named rule of a benchmark, without a model."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from realign.errors import RefusedError
from realign.evaluation.answer_files import read_answers
from realign.evaluation.benchmark import Array, Benchmark, Metrics, Rule
from realign.evaluation.registry import find_benchmark
from realign.evaluation.rows import Row, rows_digest
from realign.evaluation.statistics import intervals
from realign.runtime.files import finite_or_null

UNKNOWN = "unknown"  # version of data that is none of the published ones
COUNTS = ("tp", "fp", "tn", "fn")
Answered = Sequence[tuple[Row, str]]


def score(
    benchmark: str,
    answers: Path | str | Sequence[Path | str],
    data: Path | str,
    rule: str = "official",
    *,
    allow_subset: bool = False,
    bootstrap: int = 0,
    seed: int = 0,
) -> dict[str, Any]:
    """Score stored answers to a published benchmark by one of its rules.

    Args:
        benchmark: Its name; docs/evaluation.md lists all.
        answers: One or more files of answers, in any format that the benchmark's programs write.
        data: Folder with the benchmark's published files.
        rule: Name of the rule, such as ``official``, ``lmms-eval`` or ``vlmevalkit``.
        allow_subset: Score the answers that there are, where others are missing.
        bootstrap: Draws behind 95 % intervals, over clusters; 0 for none.
        seed: Of the draws.
    Returns:
        ``benchmark``, ``version`` of the data (``unknown`` where it is not a published one),
        ``rule``, ``note`` on it, ``unit`` of the values that are no counts, ``items`` and
        ``images`` that were scored, ``subset`` (``n of N``, or None), ``splits`` (split to metric
        to value, None where it is not defined), ``intervals`` of the same form or None,
        ``baselines`` (a constant answer to ``splits``) and ``yes_ratio`` (share of answers that the
        rule reads as yes, or None where answers are not yes or no).
    Raises:
        RefusedError: A name is unknown, a file is missing or has another form, or the answers are
            not those of the data.

    Example::

        from realign.evaluation import score

        scores = score("pope", "answers.jsonl", "pope/output/coco")
        scores["splits"]["adversarial"]["accuracy"]
    """
    chosen = find_benchmark(benchmark)
    by = find_rule(chosen, rule)
    if bootstrap < 0:
        raise RefusedError(
            f"bootstrap must be at least 0, got {bootstrap}. Pass 0 for no intervals."
        )
    tasks = {name: task.rows for name, task in chosen.read_tasks(Path(data)).items()}
    paths = [answers] if isinstance(answers, (str, Path)) else list(answers)
    answered = read_answers(
        chosen, [Path(path) for path in paths], tasks, covers=by.covers, allows_subset=allow_subset
    )
    total = sum(by.covers(row) for rows in tasks.values() for row in rows)
    is_subset = len(answered) < total
    covered = [(row, by.prepare(by.text(record, text))) for row, record, text in answered]
    if not covered:
        raise RefusedError(
            f"{', '.join(map(str, paths))} must answer a question that the rule {rule} scores, got "
            "none. Name another --rule."
        )
    splits = _split_sums(chosen, by, covered)
    return {
        "benchmark": chosen.name,
        "version": data_version(chosen, tasks),
        "rule": rule,
        "note": by.note,
        "unit": by.unit,
        "items": len(covered),
        "images": len({row["image"] for row, _ in covered if row["image"] is not None}),
        "subset": f"{len(covered)} of {total}" if is_subset else None,
        "splits": _values(by, splits),
        "intervals": _intervals(by, splits, bootstrap, seed) if bootstrap else None,
        "baselines": {
            name: _values(by, _split_sums(chosen, by, [(row, answer) for row, _ in covered]))
            for name, answer in chosen.constants.items()
            if by.scores_constants
        },
        "yes_ratio": _yes_ratio(by, [text for _, text in covered]),
    }


def find_rule(benchmark: Benchmark, name: str) -> Rule:
    """Return the rule of a name.

    Raises:
        RefusedError: The benchmark has none.
    """
    if name not in benchmark.rules:
        raise RefusedError(
            f"rule must be one of {', '.join(benchmark.rules)} for {benchmark.title}, got "
            f"{name!r}. Name one of them."
        )
    return benchmark.rules[name]


def data_version(benchmark: Benchmark, tasks: Mapping[str, Sequence[Row]]) -> str:
    """Return the name of the published version that all tasks are of."""
    names = {
        benchmark.versions.get(rows_digest(rows, *benchmark.version_keys))
        for rows in tasks.values()
    }
    name = names.pop()
    return UNKNOWN if names or name is None else name


def _split_sums(benchmark: Benchmark, rule: Rule, answered: Answered) -> dict[str, Array]:
    """Return the score vectors of all clusters by split, zero where a split has none of one."""
    clusters: dict[Any, int] = {}
    scored: dict[str, dict[int, list[tuple[Row, Sequence[float]]]]] = {}
    for row, text in answered:
        number = clusters.setdefault(row[rule.cluster or benchmark.cluster], len(clusters))
        scores = rule.score(row, text)
        for split in dict.fromkeys(row["splits"]):
            scored.setdefault(split, {}).setdefault(number, []).append((row, scores))
    sums = {}
    for split, rows_of in sorted(scored.items(), key=lambda item: item[0] != "all"):
        vectors = {number: np.asarray(rule.combine(rows)) for number, rows in rows_of.items()}
        width = len(next(iter(vectors.values())))
        sums[split] = np.zeros((len(clusters), width))
        for number, vector in vectors.items():
            sums[split][number] = vector
    return sums


def _metrics(rule: Rule, split: str) -> Metrics:
    return rule.split_metrics.get(split, rule.metrics)


def _values(rule: Rule, sums: Mapping[str, Array]) -> dict[str, dict[str, float | None]]:
    values = {}
    with np.errstate(invalid="ignore", divide="ignore"):
        for split, vectors in sums.items():
            found = _metrics(rule, split)(vectors.sum(axis=0))
            values[split] = {name: _number(name, value) for name, value in found.items()}
    return values


def _number(metric: str, value: Any) -> float | None:
    number = finite_or_null(float(value))
    return int(value) if metric in COUNTS and number is not None else number


def _intervals(
    rule: Rule, sums: Mapping[str, Array], resamples: int, seed: int
) -> dict[str, dict[str, list[float] | None]]:
    metrics: dict[str, Callable[[Array], Mapping[str, Array]]] = {
        split: _metrics(rule, split) for split in sums
    }
    return intervals(sums, metrics, resamples=resamples, seed=seed)


def _yes_ratio(rule: Rule, texts: Sequence[str]) -> float | None:
    if rule.says_yes is None:
        return None
    return sum(map(rule.says_yes, texts)) / len(texts)
