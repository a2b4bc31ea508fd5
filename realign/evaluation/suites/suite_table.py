"""The results of a suite as tables for the terminal."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from rich.console import Group, RenderableType
from rich.table import Table
from rich.text import Text

from realign.evaluation.cluster_sums import COUNTS
from realign.evaluation.table import UNDEFINED


def suite_tables(scores: Mapping[str, Any]) -> RenderableType:
    """Return, for every model, a table of the suite's own numbers, and for every benchmark one of
    its answers under each rule. Counts, intervals and constant answers are in the file alone.
    """
    parts: list[RenderableType] = []
    for name, model in scores["models"].items():
        parts.append(_aggregates(scores["suite"], name, model))
        parts += [_rules(name, benchmark, rules) for benchmark, rules in model["rescored"].items()]
        parts += [Text(note) for note in model["notes"]]
    return Group(*parts)


def _aggregates(suite: str, name: str, model: Mapping[str, Any]) -> Table:
    table = Table(title=f"{name}: numbers of {suite}")
    table.add_column("task", overflow="fold")
    table.add_column("metric", overflow="fold")
    for heading in ("value", "standard error", "questions"):
        table.add_column(heading, justify="right")
    for entry in model["aggregates"]:
        run = model["runs"][entry["task"]]
        error = entry.get("stderr_clustered", entry.get("stderr"))
        table.add_row(
            *map(Text, (entry["task"], entry["metric"], f"{entry['value']:.4f}")),
            Text(UNDEFINED if error is None else f"{error:.4f}"),
            Text(_count(run)),
        )
    return table


def _count(run: Mapping[str, Any]) -> str:
    asked, total = run.get("effective"), run.get("original")
    if asked is None:
        return UNDEFINED
    return f"{asked:,}" if asked == total else f"{asked:,} of {total:,}"


def _rules(name: str, benchmark: str, rules: Mapping[str, Any]) -> Table:
    """Return a table with a row for each metric of each split and a column for each rule."""
    some = next(iter(rules.values()))
    part = f", subset {some['subset']}" if some["subset"] else ""
    table = Table(
        title=f"{name}: answers to {benchmark} under each rule, data version {some['version']}: "
        f"{some['items']:,} answers on {some['images']:,} images{part}"
    )
    table.add_column("split", overflow="fold")
    table.add_column("metric", overflow="fold")
    for rule, found in rules.items():
        table.add_column(Text(f"{rule}\n{found['unit']}"), justify="right", overflow="fold")
    places = dict.fromkeys(
        (split, metric)
        for found in rules.values()
        for split, values in found["splits"].items()
        for metric in values
        if metric not in COUNTS
    )
    for split, metric in places:
        values = (found["splits"].get(split, {}).get(metric) for found in rules.values())
        cells = (UNDEFINED if value is None else f"{value:.4f}" for value in values)
        table.add_row(*map(Text, (split, metric, *cells)))
    return table
