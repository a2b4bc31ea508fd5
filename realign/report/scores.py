"""The part of a run's page that compares models: scores with intervals, and the same image before
and after.
"""

from __future__ import annotations

import json
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from markupsafe import Markup

from realign.eval.table import cut_note, difference, percent, score_rows
from realign.pair_view import marked
from realign.plots import bar_plot
from realign.thumbnails import data_uri


def score_part(folder: Path, tiles: list[dict[str, str]]) -> dict[str, Any]:
    """What the template needs of ``eval/``; the headline scores are added to ``tiles``."""
    scores = json.loads((folder / "scores.json").read_text(encoding="utf-8"))
    rows = list(score_rows(scores))
    models = list(rows[0][2])
    items = {task: values["items"] for task, values in scores["tasks"].items()}
    table = []
    for label, more_is_better, by_model in rows:
        cells = [
            {
                "value": percent(score["value"]),
                "difference": difference(score) if model != scores["baseline"] else "",
                "verdict": _verdict(score, more_is_better) if model != scores["baseline"] else "",
            }
            for model, score in by_model.items()
        ]
        table.append({"label": label, "cells": cells})
    last = models[-1]
    for label, _, by_model in rows:
        if label.startswith(("CHAIR_i", "POPE adversarial, balanced", "recall")):
            before, after = by_model[models[0]]["value"], by_model[last]["value"]
            name = label.partition(",")[0] if label.startswith("CHAIR") else label
            tiles.append(
                {
                    "value": f"{percent(before)} → {percent(after)}",
                    "label": f"{name}, {models[0]} → {last}, %",
                }
            )
    bars = [
        bar_plot(
            label,
            {model: (score["value"], *score["interval"]) for model, score in by_model.items()},
        )
        for label, _, by_model in rows
        if "F1" not in label
    ]
    note = (
        f"{', '.join(f'{task}: {count:,} items' for task, count in items.items())}. Percent; "
        f"below each value its "
        f"difference from {models[0]} in points with a 95 % interval (paired bootstrap over "
        f"images), coloured where the "
        f"interval excludes 0. {cut_note(scores)}"
    )
    return {
        "models": models,
        "score_rows": table,
        "score_plots": bars,
        "score_note": note,
        "samples": [_sample(sample, folder) for sample in scores["samples"]],
        "samples_model": last,
    }


def _verdict(score: Mapping[str, Any], more_is_better: bool) -> str:
    low, high = score["difference_interval"]
    if low <= 0 <= high:
        return ""
    return "better" if (low > 0) == more_is_better else "worse"


def _sample(sample: Mapping[str, Any], folder: Path) -> dict[str, Any]:
    answers = []
    for model, answer in sample["answers"].items():
        absent = answer["absent_words"]
        text = Markup()
        for word in re.findall(r"\w+|\W+", answer["text"]):
            text += marked(word, "lost" if word.lower() in absent else "")
        verdict = "chosen" if answer["is_right"] else "rejected"
        answers.append({"model": model, "text": text, "verdict": verdict})
    picture = folder / "samples" / sample["picture"]
    return {
        "picture": data_uri(picture.read_bytes(), str(picture)),
        "prompt": sample["prompt"],
        "truth": sample["truth"],
        "answers": answers,
    }
