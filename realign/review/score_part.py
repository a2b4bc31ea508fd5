"""The part of a run's page that shows the evaluation."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from markupsafe import Markup

from realign.evaluation.cluster_sums import COUNTS, SAID_YES
from realign.evaluation.table import (
    UNDEFINED,
    Cell,
    constants_note,
    cut_note,
    difference,
    draws_note,
    noise_note,
    read_scores,
    score_rows,
    split_of,
)
from realign.review.page import Tile, data_uri, tile
from realign.review.pair_view import marked
from realign.review.plots import Difference, difference_plot

VERDICTS = {"better": "▲ better", "worse": "▼ worse", "noise": "≈ inside the noise", "": ""}
CHANGES = {
    "gained": "Gained: wrong before, right after",
    "lost": "Lost: right before, wrong after",
    "other": "Changed, but neither gained nor lost",
}
PROBES = {  # name in scores.json to heading and factor
    "mean_words": ("words", 1),
    "mean_tokens": ("tokens", 1),
    "share_cut": ("cut, %", 100),
    "share_repeating": ("repeating, %", 100),
    "share_empty": ("empty, %", 100),
    "yes_ratio": ("says yes, %", 100),
}


def score_part(folder: Path, tiles: list[Tile]) -> dict[str, Any]:
    """Return the template's values for the folder ``eval``, and append tiles of headline scores."""
    scores = read_scores(folder / "scores.json")
    models = scores["models"]
    rows = list(score_rows(scores))
    tiles += [_tile(scores, row, cells) for row, cells in rows if row["is_headline"]]
    draws = scores["draws"]
    notes = (noise_note(scores), cut_note(scores), draws_note(scores))
    return {
        "models": models,
        "score_benchmarks": [_benchmark(scores, name, rows) for name in scores["benchmarks"]],
        "score_note": f"Differences are from {models[0]}, in percentage points unless a row "
        f"names another unit. "
        f"Intervals are 95 %, from {draws['bootstrap']:,} draws of a paired bootstrap "
        f"(seed {draws['seed']}). {' '.join(filter(None, notes))}",
        "score_plot": _plot(scores, rows),
        "probes": _probes(scores),
        "samples": _samples(scores, folder),
        "samples_model": models[-1],
    }


def _tile(scores: Mapping[str, Any], row: Mapping[str, Any], cells: Mapping[str, Any]) -> Tile:
    """Return the tile of a headline score: the values of the first and the last model with their
    intervals, and the difference with its interval.
    """
    models = dict.fromkeys((scores["models"][0], scores["models"][-1]))
    entries = [split_of(scores, row)["models"][model][row["metric"]] for model in models]
    values, intervals = zip(*(_with_interval(each, row["scale"]) for each in entries), strict=True)
    reasons = dict.fromkeys(c.difference for c in cells.values() if c.bar is None)
    note = f" ({UNDEFINED} {', '.join(reasons)})" if reasons else ""
    shown = []
    if any(intervals):
        first, *others = (interval or UNDEFINED for interval in intervals)
        shown = [f"95 %: {first}", *(f"→ {other};" for other in others)]
    if entries[-1]["difference_interval"] and len(models) > 1:
        shown += ["difference", difference(entries[-1], row["scale"])]
    return tile(
        " → ".join(values),
        f"{row['label']}, {' → '.join(models)}{note}",
        shown,
        VERDICTS[cells[scores["models"][-1]].verdict],
    )


def _benchmark(scores: Mapping[str, Any], name: str, rows: Sequence[Any]) -> dict[str, Any]:
    found = scores["benchmarks"][name]
    own = [(row, cells) for row, cells in rows if row["benchmark"] == name]
    first: Mapping[str, Any] = next(iter(found["rules"].values()))["splits"]
    whole = first.get("all") or max(first.values(), key=lambda split: split["items"])
    version = found.get("version")
    facts = [
        f"{whole['items']:,} questions on {whole['images']:,} images",
        f"data version {version}" if version else "",
        f"intervals over {found['clusters']:,} clusters ({found['cluster']})",
    ]
    return {
        "title": found["title"],
        "facts": ", ".join(filter(None, facts)),
        "metrics": [_metric(scores, row, cells) for row, cells in own],
        "details": [_details(scores, rule, each) for rule, each in found["rules"].items()],
    }


def _metric(
    scores: Mapping[str, Any], row: Mapping[str, Any], cells: Mapping[str, Any]
) -> dict[str, Any]:
    """Return a metric, with a line for every model."""
    split = split_of(scores, row)
    return {
        "label": row["label"],
        "about": f"rule {row['rule']}, {split['items']:,} questions on {split['images']:,} "
        f"images; {'more' if row['more_is_better'] else 'less'} is better",
        "constants": constants_note(scores, row),
        "lines": [_line(split, row, model, cell) for model, cell in cells.items()],
    }


def _line(
    split: Mapping[str, Any], row: Mapping[str, Any], model: str, cell: Cell
) -> dict[str, str]:
    entry, scale = split["models"][model][row["metric"]], row["scale"]
    test, paired = row["comparisons"].get(model), entry["paired"]
    value, interval = _with_interval(entry, scale)
    line = {
        "model": model,
        "value": value,
        "interval": interval,
        "reason": cell.difference if cell.bar is None else "",
        "difference": difference(entry, scale) if entry["difference_interval"] else "",
        "changed": "",
        "p": _p(test["p_holm"]) if test else "",
        "verdict": cell.verdict,
        "said": VERDICTS[cell.verdict],
        "warning": _warning(split, row, model),
        "detectable": "",
    }
    if counted := _counted(split["models"][model], row["metric"]):
        line["changed"] = f"+{counted['gained']:,} −{counted['lost']:,} of {counted['units']:,}"
    if paired and paired["minimum_detectable"] is not None:
        line["detectable"] = f"{scale * paired['minimum_detectable']:.1f}"
    return line


def _counted(metrics: Mapping[str, Any], metric: str) -> Mapping[str, Any] | None:
    """Return the gained and lost questions of a metric.

    A metric such as F1, which is no mean over right and wrong answers, has none; those of the
    first metric of the split that has some are returned instead.
    """
    for name in (metric, *metrics):
        found: Mapping[str, Any] | None = metrics[name]["paired"]
        if found and found["gained"] is not None:
            return found
    return None


def _with_interval(entry: Mapping[str, Any], scale: float) -> tuple[str, str]:
    """Return a value and its interval as texts; the interval may be empty."""
    if entry["value"] is None:
        return UNDEFINED, ""
    ends = [f"{scale * end:.1f}" for end in entry["interval"] or ()]
    shown = " to ".join(ends)
    return f"{scale * entry['value']:.1f}", shown


def _p(value: float | None) -> str:
    if value is None:
        return UNDEFINED
    return "below 0.001" if value < 0.001 else f"{value:.3f}"


def _warning(split: Mapping[str, Any], row: Mapping[str, Any], model: str) -> str:
    """Return a warning if a constant answer is at least as good as the model; empty otherwise."""
    value = split["models"][model][row["metric"]]["value"]
    for answer, metrics in split["constants"].items():
        constant = metrics[row["metric"]]
        if value is None or constant is None:
            continue
        if constant == value or (constant > value) == row["more_is_better"]:
            return f"answering {answer} to everything is no worse"
    return ""


def _details(scores: Mapping[str, Any], rule: str, found: Mapping[str, Any]) -> dict[str, Any]:
    """Return every metric of every split under one rule, for all models."""
    scale = 100 if found["unit"] == "fraction" else 1
    unit = "percent" if found["unit"] == "fraction" else found["unit"]
    lines = []
    for split, each in found["splits"].items():
        metrics = dict.fromkeys(name for values in each["models"].values() for name in values)
        for metric in metrics:
            factor = 1 if metric in COUNTS else 100 if metric == SAID_YES else scale
            entries = [each["models"][model][metric] for model in scores["models"]]
            values = [_number(entry["value"], metric, factor) for entry in entries]
            last = entries[-1]
            shown = difference(last, factor) if last["difference_interval"] else ""
            constants = ", ".join(
                f"{answer} {_number(values[metric], metric, factor)}"
                for answer, values in each["constants"].items()
                if values.get(metric) is not None
            )
            lines.append(
                {
                    "split": split,
                    "number": f"{each['items']:,}",
                    "metric": metric.replace("_", " "),
                    "values": values,
                    "difference": shown if len(entries) > 1 else "",
                    "constants": constants,
                }
            )
    return {"rule": rule, "unit": unit, "note": found["note"], "lines": lines}


def _number(value: float | None, metric: str, factor: float) -> str:
    if value is None:
        return UNDEFINED
    return f"{value:,.0f}" if metric in COUNTS else f"{factor * value:.1f}"


def _plot(scores: Mapping[str, Any], rows: Sequence[Any]) -> Markup | None:
    """Return a plot of the last model's differences; None if no models are compared."""
    model = scores["models"][-1]
    differences, units = [], set()
    for row, cells in rows:
        entry = split_of(scores, row)["models"][model][row["metric"]]
        if entry["paired"] is None or not entry["difference_interval"]:
            continue
        ends = (entry["difference"], *entry["difference_interval"])
        value, low, high = (row["scale"] * end for end in ends)
        verdict, more = cells[model].verdict, row["more_is_better"]
        differences.append(Difference(row["label"], value, low, high, verdict, more))
        units.add(scores["benchmarks"][row["benchmark"]]["rules"][row["rule"]]["unit"])
    unit = "points, or the unit that a label names" if "points" in units else "percentage points"
    return difference_plot(f"{model} minus {scores['baseline']}", differences, unit)


def _probes(scores: Mapping[str, Any]) -> dict[str, Any] | None:
    """Return the table of facts about the answers themselves: lengths, cut ones, repetitions."""
    lines = []
    for name, task in scores["tasks"].items():
        for model in scores["models"]:
            found = task["probes"][model]
            lines.append({"task": name, "number": f"{task['items']:,}", "model": model, **found})
    names = [name for name in PROBES if any(line.get(name) is not None for line in lines)]
    shown = [
        {
            **{key: line[key] for key in ("task", "number", "model")},
            "cells": [
                UNDEFINED if line.get(name) is None else f"{PROBES[name][1] * line[name]:.1f}"
                for name in names
            ],
        }
        for line in lines
    ]
    return {"headings": [PROBES[name][0] for name in names], "lines": shown} if names else None


def _samples(scores: Mapping[str, Any], folder: Path) -> list[dict[str, Any]]:
    """Return sample answers in three groups: gained, lost and other changes."""
    groups = []
    for change, heading in CHANGES.items():
        own = [sample for sample in scores["samples"] if sample["change"] == change]
        if own:
            counts = dict.fromkeys((sample["task"], sample["change_count"]) for sample in own)
            groups.append(
                {
                    "heading": heading,
                    "counts": "; ".join(f"{task}: {count:,} in all" for task, count in counts),
                    "samples": [_sample(sample, folder) for sample in own],
                }
            )
    return groups


def _sample(sample: Mapping[str, Any], folder: Path) -> dict[str, Any]:
    answers = [
        {
            "model": model,
            "text": _marked_phrases(answer["text"], answer["absent_words"]),
            "is_right": answer["is_right"],
        }
        for model, answer in sample["answers"].items()
    ]
    picture = folder / "samples" / sample["picture"] if sample.get("picture") else None
    return {
        "picture": data_uri(picture.read_bytes(), str(picture)) if picture else None,
        "image": sample["image"],
        "prompt": sample["prompt"],
        "truth": sample["truth"],
        "answers": answers,
    }


def _marked_phrases(text: str, phrases: Sequence[str]) -> Markup:
    """Mark phrases that occur as whole words; Chinese and Japanese ones anywhere in the text."""
    whole = [
        re.escape(phrase) if phrase[-1] > "\u3000" else rf"(?<!\w){re.escape(phrase)}(?!\w)"
        for phrase in sorted(filter(None, phrases), key=len, reverse=True)  # the longest one first
    ]
    if not whole:
        return marked(text, "")
    pieces = re.split(f"({'|'.join(whole)})", text, flags=re.IGNORECASE)
    return Markup().join(marked(piece, "absent" if i % 2 else "") for i, piece in enumerate(pieces))
