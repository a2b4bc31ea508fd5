"""Comparison of models on benchmarks: the contents of ``scores.json`` and of
``realign eval compare``.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from realign.evaluation.answer_scores import data_version
from realign.evaluation.benchmark import Benchmark, TableRow, Task
from realign.evaluation.cluster_sums import Run
from realign.evaluation.measured import Entry, Measured, Place
from realign.evaluation.probes import probes
from realign.evaluation.rows import Row, item_key
from realign.evaluation.samples import Answers, sample_answers
from realign.evaluation.significance import CONFIDENCE, holm
from realign.evaluation.statistics import Draws
from realign.evaluation.table import SCHEMA
from realign.generation.generator import Answer

RUN = "1"  # the name of the run of a model with a single run
# keys of rows that name clusters, where the key itself says little to a reader
CLUSTER_WORDS = {"id": "question", "group": "question", "merged_set": "merged set"}


def score(
    tasks: Mapping[str, Task], answers: Answers, *, resamples: int, seed: int
) -> dict[str, Any]:
    """Score the answers of several models to the same items.

    Args:
        tasks: Name to task.
        answers: Model to its answers by :func:`~realign.evaluation.rows.item_key`; the first model
            is the baseline.
        resamples: Number of draws of the bootstrap, and of the permutation test.
        seed: Seed of the draws.
    Returns:
        The content of ``scores.json``; docs/guides/evaluation.md has its keys.
    """
    draws = Draws(resamples, seed)
    by_benchmark: dict[Benchmark, dict[str, Task]] = {}
    for name, task in tasks.items():
        by_benchmark.setdefault(task.benchmark, {})[name] = task
    measured, table = [], []
    for benchmark, its_tasks in by_benchmark.items():
        by_task = {name: task.rows for name, task in its_tasks.items()}
        rows = with_splits(benchmark, by_task)
        facts = {"version": data_version(benchmark, by_task), "subset": None}
        rules = {
            name: rule
            for name, rule in benchmark.rules.items()
            if rule.judging is None and not rule.needs_packages
        }  # the others need a judge, or packages that may be missing
        if not rules:
            continue
        texts = {
            Run(name, model, RUN): [
                [rule.prepare(stored[item_key(row)].text) for row in rows if rule.covers(row)]
            ]
            for name, rule in rules.items()
            for model, stored in answers.items()
        }
        measured.append(Measured(benchmark, rows, texts, rules, draws, facts))
        table += [
            (measured[-1], row)
            for row in benchmark.table
            if row.task in its_tasks and (row.split, row.metric) in measured[-1].places(row.rule)
        ]
    return {
        **comparison_of(measured, table, draws, [*answers]),
        "tasks": {name: _task(task, answers) for name, task in tasks.items()},
        "samples": sample_answers(tasks, answers),
    }


def comparison_of(
    measured: Sequence[Measured],
    table: Sequence[tuple[Measured, TableRow]],
    draws: Draws,
    models: Sequence[str],
) -> dict[str, Any]:
    """Return the scores and comparisons of ``scores.json``.

    Args:
        measured: Scores of each benchmark, all of the same models.
        table: Rows of the table. All their comparisons together are adjusted for multiplicity.
        draws: Draws on which the intervals rest.
        models: Names of the models, the baseline first.
    """
    benchmarks = {found.benchmark.name: _entries(found) for found in measured}
    rows = [
        {
            **row._asdict(),
            "benchmark": found.benchmark.name,
            "title": found.benchmark.title,
            "comparisons": {},
        }
        for found, row in table
    ]
    return {
        "schema": SCHEMA,
        "baseline": models[0],
        "models": [*models],
        "draws": {"bootstrap": draws.number, "permutation": draws.number, "seed": draws.seed},
        "confidence": CONFIDENCE,
        "benchmarks": benchmarks,
        "table": rows,
        "num_comparisons": _adjust(rows, [found for found, _ in table], benchmarks),
    }


def with_splits(benchmark: Benchmark, tasks: Mapping[str, Sequence[Row]]) -> list[Row]:
    """Return the rows of all tasks, with the splits that each belongs to."""
    return [
        {**row, "splits": benchmark.splits(name, row)}
        for name, rows in tasks.items()
        for row in rows
    ]


def _task(task: Task, answers: Answers) -> dict[str, Any]:
    by_model: dict[str, list[Answer]] = {
        model: [stored[item_key(row)] for row in task.rows] for model, stored in answers.items()
    }
    return {
        "benchmark": task.benchmark.name,
        "items": len(task.rows),
        "images": _num_images(task.rows),
        "cut": {model: sum(answer.is_cut for answer in found) for model, found in by_model.items()},
        "probes": {model: probes(task.benchmark, found) for model, found in by_model.items()},
    }


def _num_images(rows: Sequence[Row]) -> int:
    return len({row["image"] for row in rows if row["image"] is not None})


def _entries(measured: Measured) -> dict[str, Any]:
    """Return the entry of one benchmark in ``scores.json``."""
    return {
        "title": measured.benchmark.title,
        "cluster": _cluster_words(measured),
        "clusters": measured.num_clusters,
        **measured.facts,
        "rules": {
            name: {
                "unit": rule.unit,
                "note": rule.note,
                "splits": _split_entries(measured, name),
            }
            for name, rule in measured.rules.items()
        },
    }


def _cluster_words(measured: Measured) -> str:
    """Return the words for clusters; several if rules have different clusters."""
    keys = [rule.cluster or measured.benchmark.cluster for rule in measured.rules.values()]
    return " and ".join(dict.fromkeys(CLUSTER_WORDS.get(key, key) for key in keys))


def _split_entries(measured: Measured, rule: str) -> dict[str, Any]:
    rows = [measured.all_rows[i] for i in measured.rows[rule]]
    constants = measured.constants(rule)
    splits: dict[str, Any] = {}
    for place in measured.places(rule):
        if place.split not in splits:
            parts = measured.benchmark.means.get(place.split, (place.split,))
            inside = [row for row in rows if not {*parts}.isdisjoint(row["splits"])]
            splits[place.split] = {
                "items": len(inside),
                "images": _num_images(inside),
                "models": {model: {} for model in measured.runs},
                "constants": {answer: {} for answer in constants},
            }
        found = splits[place.split]
        for model, metrics in found["models"].items():
            metrics[place.metric] = measured.entry(rule, model, place)
        for answer, metrics in found["constants"].items():
            metrics[place.metric] = measured.defined(constants[answer].get(place))
    return splits


def _adjust(
    rows: Sequence[dict[str, Any]], measured: Sequence[Measured], benchmarks: Mapping[str, Any]
) -> int:
    """Adjust the comparisons of a table for their number by Holm's method; return the number.

    The comparisons are ordered by their p values. With n comparisons, the interval of the first has
    the level 1 - 0.05 / n, the next one 1 - 0.05 / (n - 1), and so on. From the first comparison
    whose interval contains 0, or whose adjusted p value exceeds 0.05, all are inside the noise. The
    p value is required too, since the bootstrap interval excludes 0 too readily where hardly any
    item is gained or lost.
    """
    tests = []
    for row, found in zip(rows, measured, strict=True):
        models = benchmarks[row["benchmark"]]["rules"][row["rule"]]["splits"][row["split"]]
        for model, metrics in models["models"].items():
            entry: Entry = metrics[row["metric"]]
            # counts have no interval, so they get no verdict
            is_tested = entry["paired"] is not None and entry["difference_interval"] is not None
            if is_tested and entry["paired"]["p"] is not None:
                tests.append((entry["paired"]["p"], row, model, found, entry))
    tests.sort(key=lambda test: test[0])  # stable: equal ones stay in the order of the table
    adjusted = holm([p for p, *_ in tests])
    is_inside = False
    for rank, (p, row, model, found, entry) in enumerate(tests):
        level = 1 - (1 - CONFIDENCE) / (len(tests) - rank)
        place = Place(row["split"], row["metric"])
        interval = found.difference_interval(row["rule"], model, place, entry, level)
        holds_0 = interval is None or interval[0] <= 0 <= interval[1]
        is_inside = is_inside or holds_0 or adjusted[rank] > 1 - CONFIDENCE + 1e-12
        row["comparisons"][model] = {
            "p": p,
            "p_holm": adjusted[rank],
            "level": level,
            "interval_holm": interval,
            "is_inside_noise": is_inside,
        }
    return len(tests)
