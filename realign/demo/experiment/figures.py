"""Figures of the results as SVG files."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Any

from realign.demo.experiment.intervals import t_interval
from realign.review.plots import Axis, bar_plot, line_plot

MAIN = ("base", "DPO", "SFT", "rDPO", "mDPO", "vDPO")
CURVES = {"free.chair_i": "CHAIR_i", "free.recall": "recall"}


def figures(results: Mapping[str, Any]) -> dict[str, str]:
    """Return file name to figure: bars of the main conditions, and curves over rows of tuning."""
    found = {
        f"{label.lower()}.svg": str(bar_plot(f"{label}, free scenes", _bars(results, measure)))
        for measure, label in CURVES.items()
    }
    for measure, label in CURVES.items():
        title = f"{label} over rows of 16 answers, tuning seeds"
        found[f"{label.lower()}_over_rows.svg"] = str(
            line_plot(title, _curves(results, measure), Axis("percent"), label="rows")
        )
    return found


def _bars(results: Mapping[str, Any], measure: str) -> dict[str, tuple[float, float, float] | None]:
    bars: dict[str, tuple[float, float, float] | None] = {}
    for view in results["views"]:
        if view["condition"] not in MAIN or view["at"] != "best":
            continue
        values = [None if one is None else one[measure] for one in view["scores"].values()]
        known = [value for value in values if value is not None]
        bars[view["condition"]] = _ends(known) if len(known) == len(values) else None
    return bars


def _ends(values: Sequence[float]) -> tuple[float, float, float]:
    """Return mean and interval; the interval of a single seed has its value at both ends."""
    mean, low, high = t_interval(values)
    return (mean, low, high) if math.isfinite(high) else (mean, mean, mean)


def _curves(results: Mapping[str, Any], measure: str) -> dict[str, list[tuple[float, float]]]:
    """Return the curve of each objective at the learning rate and beta of its best setting."""
    curves: dict[str, list[tuple[float, float]]] = {}
    for name, search in results["tuning"].items():
        if name not in MAIN:
            continue
        points = []
        for setting in search["settings"]:
            values = [value for key, value in setting.items() if key.isdigit()]
            if None in values or any(
                setting[key] != search["best"][key] for key in ("learning_rate", "beta")
            ):
                continue
            mean = sum(value[measure] for value in values) / len(values)
            points.append((float(setting["rows"]), 100 * mean))
        curves[name] = sorted(points)
    return curves
