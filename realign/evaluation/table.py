"""Scores as a table for the terminal."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any

from rich.table import Table

from realign.evaluation.pope import SPLITS

# (task, metric, label, whether more is better); what is shown first everywhere
ROWS = (
    *(
        (f"pope_{split}", "balanced_accuracy", f"POPE {split}, balanced accuracy", True)
        for split in SPLITS
    ),
    *((f"pope_{split}", "f1", f"POPE {split}, F1", True) for split in SPLITS),
    ("chair", "chair_i", "CHAIR_i, named objects that are not there", False),
    ("chair", "recall", "recall, objects there that are named", True),
)


def percent(value: float) -> str:
    """A fraction as a percentage with one decimal."""
    return f"{100 * value:.1f}"


def difference(score: Mapping[str, Any]) -> str:
    """Difference from the baseline in points, with its 95 % interval."""
    low, high = score["difference_interval"]
    # z: no minus before a zero
    return f"{100 * score['difference']:+z.1f} [{100 * low:+z.1f}, {100 * high:+z.1f}]"


def score_rows(scores: Mapping[str, Any]) -> Iterator[tuple[str, bool, dict[str, dict[str, Any]]]]:
    """Label, whether more is better, and model -> score, for every metric that was measured."""
    for task, metric, label, more_is_better in ROWS:
        if task in scores["tasks"]:
            models = scores["tasks"][task]["models"]
            yield label, more_is_better, {model: values[metric] for model, values in models.items()}


def cut_note(scores: Mapping[str, Any]) -> str:
    """How many answers of each model reached the limit on their length; empty when none did."""
    cut: dict[str, int] = {}
    for task in scores["tasks"].values():
        for model, count in task["cut"].items():
            cut[model] = cut.get(model, 0) + count
    if not any(cut.values()):
        return ""
    items = sum(task["items"] for task in scores["tasks"].values())
    counts = ", ".join(f"{model} {count:,}" for model, count in cut.items())
    return f"Of {items:,} answers, cut at max_new_tokens: {counts}."


def scores_table(scores: Mapping[str, Any]) -> Table:
    """The paired comparison as a rich table; bold where the interval excludes 0 on the better
    side.
    """
    table = Table(
        title="percent; differences from the baseline in points, 95 % paired bootstrap over images",
        caption=cut_note(scores) or None,
    )
    table.add_column("")
    for row, (label, more_is_better, models) in enumerate(score_rows(scores)):
        if row == 0:
            for model in models:
                table.add_column(model, justify="right")
        cells = []
        for model, score in models.items():
            text = percent(score["value"])
            if model != scores["baseline"]:
                low, high = score["difference_interval"]
                better = low > 0 if more_is_better else high < 0
                text = f"{text}  {difference(score)}"
                text = f"[bold green]{text}[/]" if better else text
            cells.append(text)
        table.add_row(label, *cells)
    return table
