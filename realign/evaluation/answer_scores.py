"""Scores of answers of any program, by a named rule of a benchmark, without a model."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from contextlib import suppress
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from realign.errors import RefusedError
from realign.evaluation.answer_files import Answered, holds_answers, named_questions, read_answers
from realign.evaluation.benchmark import Array, Benchmark, Metrics, MissingData, Rule
from realign.evaluation.cluster_sums import COUNTS, split_vectors
from realign.evaluation.gradings import (
    averaged,
    counted,
    joined,
    judges,
    ordered_bounds,
    read_gradings,
    spread,
)
from realign.evaluation.registry import PARTS, find_rule, read_rule_tasks
from realign.evaluation.rows import Row, rows_digest
from realign.evaluation.statistics import intervals
from realign.runtime.files import finite_or_null

OFFICIAL = "official"
UNKNOWN = "unknown"  # version of data that is none of the published ones
Scored = Sequence[tuple[Row, str]]  # a row and its answer, or the verdict on it


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
        benchmark: Its name; docs/guides/evaluation.md lists all.
        answers: One or more files of answers, in any format that the benchmark's programs write.
        data: Folder with the benchmark's published files.
        rule: Name of the rule, such as ``official``, ``lmms-eval`` or ``vlmevalkit``.
        allow_subset: Whether to score the existing answers if others are missing.
        bootstrap: Number of draws of clusters for the 95 % intervals; 0 for none.
        seed: Of the draws.
    Returns:
        ``benchmark``, ``version`` of the data (``unknown`` where it is not a published one),
        ``rule``, ``note`` on it, ``unit`` of the values that are no counts, ``items`` and
        ``images`` that were scored, ``subset`` (``n of N``, or None), ``splits`` (split to metric
        to value, None where it is not defined), ``intervals`` of the same form or None,
        ``baselines`` (a constant answer to ``splits``) and ``yes_ratio`` (share of answers that the
        rule reads as yes, or None where answers are not yes or no).

        Of a rule that reads the replies of a judge, and None otherwise: ``unjudged`` (the number of
        answers without a verdict as ``items`` and their ``ids``; while there is one every value is
        None), ``bounds`` (split to metric to the lowest and the highest value that verdicts on
        these could give; None where all are judged) and ``judging`` (``unparsed``, the answers that
        the rule scores though a reply holds no verdict; ``gradings``, the ``splits`` of each one,
        of which those above are the means; their ``spread``, None for one grading; ``judges``).

        Of ``amber`` with answers to both of its parts, ``benchmark``, ``rule`` and ``parts``, which
        has all of that by the name of each part.
    Raises:
        RefusedError: A name is unknown, a file is missing or has another form, or the answers are
            not those of the data.

    Example::

        >>> from realign.evaluation import score
        >>> scores = score("pope", "answers.jsonl", "pope")
        >>> scores["splits"]["random"]["accuracy"]
        0.75
    """
    if bootstrap < 0:
        raise RefusedError(
            f"bootstrap must be at least 0, got {bootstrap}. Pass 0 for no intervals."
        )
    if seed < 0:
        raise RefusedError(f"seed must be at least 0, got {seed}. Pass another.")
    paths = [Path(path) for path in ([answers] if isinstance(answers, (str, Path)) else answers)]
    options = _Options(paths, Path(data), allow_subset, bootstrap, seed)
    if benchmark in PARTS:
        return _score_parts(benchmark, rule, options)
    return _score_one(*find_rule(benchmark, rule, takes_parts=True), rule, options)


class _Options(NamedTuple):
    paths: list[Path]
    data: Path
    allow_subset: bool
    bootstrap: int
    seed: int


def _score_parts(name: str, rule: str, options: _Options) -> dict[str, Any]:
    """Score the parts of a benchmark that the answers belong to, each as though it were alone. A
    part that lacks the rule is scored by its official one where another part has it.
    """
    rows: dict[str, list[Row]] = {}
    for part in PARTS[name]:
        with suppress(MissingData):
            tasks = part.read_tasks(options.data).values()
            found = [row for task in tasks for row in task.rows]
            if holds_answers(part, options.paths, found):
                rows[part.name] = found
    answered = [part for part in PARTS[name] if part.name in rows]
    if not answered:
        raise RefusedError(
            f"{', '.join(map(str, options.paths))} must answer questions of "
            f"{' or '.join(part.title for part in PARTS[name])} in {options.data}, got none of "
            "them. Give the answers to this data."
        )
    if len(answered) == 1:
        return _score_one(*find_rule(answered[0].name, rule), rule, options)
    if not any(rule in part.rules for part in answered):
        known = dict.fromkeys(rule for part in answered for rule in part.rules)
        raise RefusedError(
            f"rule must be one of {', '.join(known)} for {name}, got {rule!r}. Name one of them."
        )
    parts = {}
    for part in answered:
        used = rule if rule in part.rules else OFFICIAL
        others = [row for other in answered if other is not part for row in rows[other.name]]
        parts[part.name] = _score_one(part, part.rules[used], used, options, others)
    return {"benchmark": name, "rule": rule, "parts": parts}


def _score_one(
    chosen: Benchmark, by: Rule, rule: str, options: _Options, others: Sequence[Row] = ()
) -> dict[str, Any]:
    """Score the answers to one benchmark; those to other rows are left out."""
    paths, data, allow_subset, bootstrap, seed = options
    read = read_rule_tasks(chosen, rule, data, partial(named_questions, chosen, paths))
    tasks = {name: task.rows for name, task in read.items()}
    answered = read_answers(
        chosen, paths, tasks, covers=by.covers, allows_subset=allow_subset, others=others
    )
    total = sum(by.covers(row) for rows in tasks.values() for row in rows)
    is_subset = len(answered) < total
    if not answered:
        raise RefusedError(
            f"{', '.join(map(str, paths))} must answer a question that the rule {rule} scores, got "
            "none. Name another --rule."
        )
    if by.judging is None:
        covered = [(item.row, by.prepare(item.answer)) for item in answered]
        measured = _Measured(by, _split_sums(chosen, by, covered))
        found = {
            "splits": _values(measured.rule, measured.sums),
            "yes_ratio": _yes_ratio(by, [text for _, text in covered]),
            "unjudged": None,
            "bounds": None,
            "judging": None,
        }
    else:
        measured, found = _judged(chosen, by, answered)
    has_values = found["bounds"] is None
    return {
        "benchmark": chosen.name,
        "version": data_version(chosen, tasks),
        "rule": rule,
        "note": by.note,
        "unit": by.unit,
        "items": len(answered),
        "images": len({item.row["image"] for item in answered if item.row["image"] is not None}),
        "subset": f"{len(answered)} of {total}" if is_subset else None,
        **found,
        "intervals": _intervals(*measured, bootstrap, seed) if bootstrap and has_values else None,
        "baselines": _baselines(chosen, by, [item.row for item in answered]),
    }


class _Measured(NamedTuple):
    rule: Rule
    sums: dict[str, Array]


def _judged(
    benchmark: Benchmark, rule: Rule, answered: Sequence[Answered]
) -> tuple[_Measured, dict[str, Any]]:
    """Return the score vectors of a rule that reads verdicts, and their entries in a result."""
    gradings = read_gradings(benchmark, rule, answered)
    metrics, split_metrics = averaged(rule, len(gradings))
    mean = replace(rule, metrics=metrics, split_metrics=split_metrics)
    worst = [_split_sums(benchmark, rule, grading.worst) for grading in gradings]
    best = [_split_sums(benchmark, rule, grading.best) for grading in gradings]
    runs: list[dict[str, Any]] = [
        {
            "splits": _without_values(values) if grading.unjudged else values,
            "unjudged": grading.unjudged,
            "unparsed": grading.unparsed,
        }
        for grading, sums in zip(gradings, worst, strict=True)
        for values in [_values(rule, sums)]
    ]
    lowest = _values(mean, joined(worst))
    unjudged = counted(grading.unjudged for grading in gradings)
    is_whole = not unjudged["items"]
    found = {
        "splits": lowest if is_whole else _without_values(lowest),
        "yes_ratio": None,
        "unjudged": unjudged,
        "bounds": None if is_whole else ordered_bounds(lowest, _values(mean, joined(best))),
        "judging": {
            "unparsed": counted(grading.unparsed for grading in gradings),
            "gradings": runs,
            "spread": spread([run["splits"] for run in runs]) if len(runs) > 1 else None,
            "judges": judges(answered),
        },
    }
    return _Measured(mean, joined(worst)), found


def _without_values(splits: Mapping[str, Mapping[str, Any]]) -> dict[str, dict[str, None]]:
    return {split: dict.fromkeys(values) for split, values in splits.items()}


def _baselines(benchmark: Benchmark, rule: Rule, rows: Sequence[Row]) -> dict[str, Any]:
    """Return the scores of the constant answers that no judge has to read."""
    return {
        name: _values(rule, _split_sums(benchmark, rule, [(row, answer) for row in rows]))
        for name, answer in benchmark.constants.items()
        if rule.judging is None or not any(rule.judging.asks_about(row, answer) for row in rows)
    }


def data_version(benchmark: Benchmark, tasks: Mapping[str, Sequence[Row]]) -> str:
    """Return the name of the published version that all tasks are of."""
    names = {
        benchmark.versions.get(rows_digest(rows, *benchmark.version_keys))
        for rows in tasks.values()
    }
    name = names.pop()
    return UNKNOWN if names or name is None else name


def _split_sums(benchmark: Benchmark, rule: Rule, answered: Scored) -> dict[str, Array]:
    """Return the score vectors of all clusters by split, zero if a split has no row of one."""
    key = rule.cluster or benchmark.cluster
    rows = [row for row, _ in answered]
    places = {cluster: n for n, cluster in enumerate(dict.fromkeys(row[key] for row in rows))}
    texts = [text for _, text in answered]
    return split_vectors(rule, key, rows, texts, places, len(places))[0]


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
