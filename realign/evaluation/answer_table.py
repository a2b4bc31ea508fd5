"""Scores of an answer file as a table for the terminal."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from functools import partial
from typing import Any

from rich.box import SIMPLE_HEAD
from rich.console import Group, RenderableType
from rich.table import Table
from rich.text import Text

from realign.evaluation.cluster_sums import COUNTS
from realign.evaluation.table import UNDEFINED, Fitting, unit_note

SHOWN_IDS = 10  # of unjudged answers; JSON has all
UNCOMPARED = (*COUNTS, "yes_ratio")  # counts, and what a constant answer fixes


def answer_table(scores: Mapping[str, Any]) -> RenderableType:
    """Return the result of :func:`realign.evaluation.score` as a table, with its basis.

    Splits are columns, or rows where there are more of them than metrics, as of MME's tasks; where
    these columns do not fit into the terminal, every split of every metric is a row. Each part of a
    benchmark has its own table.
    """
    if "parts" in scores:
        return Group(*map(answer_table, scores["parts"].values()))
    table = Fitting(_wide_table(scores), _long_tables(scores))
    return Group(table, *(Text(line) for line in _notes(scores)))


def _wide_table(scores: Mapping[str, Any]) -> Table:
    splits = scores["splits"]
    metrics = _metrics(splits)
    has_split_rows = len(metrics) < len(splits)
    columns, rows = (metrics, splits) if has_split_rows else (splits, metrics)
    table = Table(title=_title(scores))
    table.add_column("", overflow="fold")
    for name in columns:
        # data may hold what rich takes for styles; a number is never cut
        table.add_column(Text(name), justify="right", overflow="fold")
    for row in rows:
        places = [(row, name) if has_split_rows else (name, row) for name in columns]
        values = [splits[split].get(metric) for split, metric in places]
        table.add_row(
            Text(row), *(_number(value, scores["unit"]) for value in values), style="bold"
        )
        if all(metric in UNCOMPARED for _, metric in places):
            continue
        for label, style, shown in _beside(scores):
            table.add_row(f"  {label}", *(shown(*place) for place in places), style=style)
    return table


def _long_tables(scores: Mapping[str, Any]) -> RenderableType:
    """Return a row for every split of every metric, with what stands beside its value; and a row
    for the counts of every split.
    """
    splits = scores["splits"]
    metrics = _metrics(splits)
    table = _plain_table(["metric", "split"])
    table.add_column("value", justify="right", overflow="fold", style="bold")
    beside = list(_beside(scores))
    for label, style, _ in beside:
        table.add_column(Text(label), justify="right", overflow="fold", style=style)
    for metric in metrics:
        names = [name for name, values in splits.items() if metric in values]
        for place, split in enumerate(names if metric not in COUNTS else ()):
            value = _number(splits[split][metric], scores["unit"])
            others = [] if metric in UNCOMPARED else [shown(split, metric) for *_, shown in beside]
            first = Text("" if place else metric, "bold")
            is_last = place == len(names) - 1
            table.add_row(first, Text(split), value, *others, end_section=is_last)
    parts: list[RenderableType] = [Text(_title(scores), "italic"), table]
    if counts := [metric for metric in metrics if metric in COUNTS]:
        counted = _plain_table(["split"])
        for metric in counts:
            counted.add_column(Text(metric), justify="right", overflow="fold")
        for split, values in splits.items():
            cells = (_number(values.get(metric), scores["unit"]) for metric in counts)
            counted.add_row(Text(split), *cells)
        parts.append(counted)
    return Group(*parts)


def _plain_table(names: Sequence[str]) -> Table:
    table = Table(box=SIMPLE_HEAD, padding=(0, 1, 0, 0))
    for name in names:
        table.add_column(name, overflow="fold")
    return table


def _metrics(splits: Mapping[str, Any]) -> list[str]:
    return [*dict.fromkeys(name for values in splits.values() for name in values)]


def _beside(scores: Mapping[str, Any]) -> Iterator[tuple[str, str, Callable[[str, str], str]]]:
    """Yield what is told of a value: its name, its style, and its text by split and metric."""
    unit, intervals = scores["unit"], scores["intervals"]
    for label, found in [*_of_gradings(scores), *([("95 %", intervals)] if intervals else [])]:
        yield label, "", partial(_shown_interval, found, unit)
    for answer, constant in scores["baselines"].items():
        yield f"all {answer}", "dim", partial(_shown_number, constant, unit)


def _shown_interval(found: Mapping[str, Any], unit: str, split: str, metric: str) -> str:
    return _interval(found[split].get(metric), unit)


def _shown_number(found: Mapping[str, Any], unit: str, split: str, metric: str) -> str:
    return _number(found[split].get(metric), unit)


def _title(scores: Mapping[str, Any]) -> str:
    part = f", subset {scores['subset']}" if scores["subset"] else ""
    return (
        f"{scores['benchmark']}, rule {scores['rule']}, data version {scores['version']}: "
        f"{scores['items']:,} answers on {scores['images']:,} images{part}"
    )


def _number(value: float | int | None, unit: str) -> str:
    if value is None:
        return UNDEFINED
    return f"{value:,}" if isinstance(value, int) else f"{value:.{4 if unit == 'fraction' else 2}f}"


def _interval(interval: list[float] | None, unit: str) -> str:
    decimals = 3 if unit == "fraction" else 1
    return "-".join(f"{end:.{decimals}f}" for end in interval) if interval else UNDEFINED


def _of_gradings(scores: Mapping[str, Any]) -> list[tuple[str, dict[str, Any]]]:
    """Return the bounds of values that are withheld, and the lowest and highest of gradings."""
    found = [("bounds", scores["bounds"])] if scores["bounds"] else []
    if scores["judging"] and (spread := scores["judging"]["spread"]):
        ranges = {
            split: {name: one and [one["min"], one["max"]] for name, one in metrics.items()}
            for split, metrics in spread.items()
        }
        found.append(("gradings", ranges))
    return found


def _judging_notes(scores: Mapping[str, Any]) -> list[str]:
    judging, unjudged, unit = scores["judging"], scores["unjudged"], scores["unit"]
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
            values = ", ".join(_number(run[metric], unit) for run in runs)
            deviation = f"; standard deviation {_number(one['sd'], unit)}" if one else ""
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
