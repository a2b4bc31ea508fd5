"""Scores of an answer file as a table for the terminal."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from rich.console import Group, RenderableType
from rich.table import Table
from rich.text import Text

UNDEFINED = "—"
UNCOMPARED = ("tp", "fp", "tn", "fn", "yes_ratio")  # counts, and what a constant answer fixes


def answer_table(scores: Mapping[str, Any]) -> RenderableType:
    """Return what :func:`realign.evaluation.score` returns as a table, with what it rests on.

    Splits are columns, or rows where there are more of them than metrics, as of MME's tasks.
    """
    splits, intervals = scores["splits"], scores["intervals"]
    metrics = [*dict.fromkeys(name for values in splits.values() for name in values)]
    has_split_rows = len(metrics) < len(splits)
    columns, rows = (metrics, splits) if has_split_rows else (splits, metrics)
    table = Table(title=_title(scores))
    table.add_column("", overflow="fold")
    for name in columns:
        # data may hold what rich takes for styles; a number is never cut
        table.add_column(Text(name), justify="right", overflow="fold")
    for row in rows:
        places = [(row, name) if has_split_rows else (name, row) for name in columns]
        shown = [_number(splits[split].get(metric)) for split, metric in places]
        table.add_row(Text(row), *shown, style="bold")
        if all(metric in UNCOMPARED for _, metric in places):
            continue
        if intervals:
            cells = [_interval(intervals[split].get(metric)) for split, metric in places]
            table.add_row("  95 %", *cells)
        for answer, constant in scores["baselines"].items():
            cells = [_number(constant[split].get(metric)) for split, metric in places]
            table.add_row(f"  all {answer}", *cells, style="dim")
    return Group(table, *(Text(line) for line in _notes(scores)))


def _title(scores: Mapping[str, Any]) -> str:
    part = f", subset {scores['subset']}" if scores["subset"] else ""
    return (
        f"{scores['benchmark']}, rule {scores['rule']}, data version {scores['version']}: "
        f"{scores['items']:,} answers on {scores['images']:,} images{part}"
    )


def _number(value: float | int | None) -> str:
    if value is None:
        return UNDEFINED
    return f"{value:,}" if isinstance(value, int) else f"{value:.4f}"


def _interval(interval: list[float] | None) -> str:
    return f"{interval[0]:.3f}-{interval[1]:.3f}" if interval else UNDEFINED


def _notes(scores: Mapping[str, Any]) -> list[str]:
    notes = [f"Unit of what is no count: {scores['unit']}. {scores['note']}"]
    if scores["yes_ratio"] is not None:
        notes.append(f"Answers that this rule reads as yes: {scores['yes_ratio']:.4f} of all.")
    if scores["baselines"]:
        notes.append("Below a score stand those of a constant answer, which needs no image.")
    return notes
