"""Scores of an answer file as a table for the terminal."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from rich.console import Group, RenderableType
from rich.table import Table
from rich.text import Text

from realign.evaluation.cluster_sums import COUNTS
from realign.evaluation.table import UNDEFINED, unit_note

SHOWN_IDS = 10  # of unjudged answers; JSON has all
UNCOMPARED = (*COUNTS, "yes_ratio")  # counts, and what a constant answer fixes


def answer_table(scores: Mapping[str, Any]) -> RenderableType:
    """Return the result of :func:`realign.evaluation.score` as a table, with its basis.

    Splits are columns, or rows where there are more of them than metrics, as of MME's tasks. Each
    part of a benchmark has its own table.
    """
    if "parts" in scores:
        return Group(*map(answer_table, scores["parts"].values()))
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
        for label, found in _of_gradings(scores):
            cells = [_interval(found[split].get(metric)) for split, metric in places]
            table.add_row(label, *cells)
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


def _of_gradings(scores: Mapping[str, Any]) -> list[tuple[str, dict[str, Any]]]:
    """Return the bounds of values that are withheld, and the lowest and highest of gradings."""
    found = [("  bounds", scores["bounds"])] if scores["bounds"] else []
    if scores["judging"] and (spread := scores["judging"]["spread"]):
        ranges = {
            split: {name: one and [one["min"], one["max"]] for name, one in metrics.items()}
            for split, metrics in spread.items()
        }
        found.append(("  gradings", ranges))
    return found


def _judging_notes(scores: Mapping[str, Any]) -> list[str]:
    judging, unjudged = scores["judging"], scores["unjudged"]
    notes = [_judge_note(judge) for judge in judging["judges"]]
    if unjudged["items"]:
        notes.append(
            f"Unjudged: {_ids(unjudged)}. Values are withheld while there are any; bounds are the "
            "scores if a judge found all of these wrong, and all right."
        )
    if judging["unparsed"]["items"]:
        notes.append(
            f"Replies without a verdict, scored all the same: {_ids(judging['unparsed'])}. The "
            "rule strict withholds the score instead."
        )
    if judging["spread"]:
        runs = [run["splits"]["all"] for run in judging["gradings"]]
        for metric, one in judging["spread"]["all"].items():
            values = ", ".join(_number(run[metric]) for run in runs)
            deviation = f"; standard deviation {one['sd']:.4f}" if one else ""
            notes.append(f"Gradings of all, {metric}: {values}{deviation}. Scores are their means.")
    elif unjudged["items"] == 0:
        notes.append("One grading: how far a judge agrees with itself is not known.")
    return notes


def _judge_note(judge: Mapping[str, Any]) -> str:
    prompt = judge["prompt"] or "not stated in the files"
    digest = f" (sha256 {judge['prompt_sha256'][:16]})" if judge["prompt_sha256"] else ""
    model = judge["model"] or "not stated in the files"
    return f"Judge: {model}; prompt: {prompt}{digest}; {judge['replies']:,} replies."


def _ids(counted: Mapping[str, Any]) -> str:
    shown = ", ".join(counted["ids"][:SHOWN_IDS])
    more = counted["items"] - SHOWN_IDS
    return f"{counted['items']:,} answers ({shown}{f' and {more:,} more' if more > 0 else ''})"


def _notes(scores: Mapping[str, Any]) -> list[str]:
    metrics = {name for values in scores["splits"].values() for name in values}
    has_counts = not metrics.isdisjoint(COUNTS)
    notes = [unit_note(scores["unit"], scores["note"], has_counts=has_counts)]
    if scores["yes_ratio"] is not None:
        notes.append(f"Answers that this rule reads as yes: {scores['yes_ratio']:.4f} of all.")
    if scores["baselines"]:
        notes.append("Below a score stand those of a constant answer, which needs no image.")
    if scores["judging"]:
        notes += _judging_notes(scores)
    return notes
