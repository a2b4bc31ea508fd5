"""Scores as a table for the terminal."""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any, NamedTuple

from rich.table import Table
from rich.text import Text

from realign.errors import RefusedError

SCHEMA = 2  # of scores.json
STYLES = {"better": "bold green", "worse": "", "": ""}
Scores = Mapping[str, Any]


def read_scores(path: Path) -> Scores:
    """Read ``scores.json``.

    Raises:
        RefusedError: Another version wrote it.
    """
    scores: Scores = json.loads(path.read_text(encoding="utf-8"))
    if scores.get("schema") != SCHEMA:
        raise RefusedError(
            f"{path} must have schema {SCHEMA}, got {scores.get('schema', 1)}. Give the same "
            "`realign eval` or `realign demo` again; it scores the stored answers anew."
        )
    return scores


class Cell(NamedTuple):
    """A score as it is printed."""

    value: str
    difference: str  # from the baseline, with its 95 % interval; empty for the baseline
    verdict: str  # "better" or "worse" where that interval excludes 0
    bar: tuple[float, float, float]  # value and interval


def score_rows(scores: Scores) -> Iterator[tuple[Scores, dict[str, Cell]]]:
    """Yield each row of the table (see :class:`~realign.evaluation.benchmark.TableRow`) with its
    cell by model.
    """
    for row in scores["table"]:
        models = scores["tasks"][row["task"]]["rules"][row["rule"]]
        cells = {model: _cell(metrics[row["metric"]], row) for model, metrics in models.items()}
        cells[scores["baseline"]] = cells[scores["baseline"]]._replace(difference="")
        yield row, cells


def _cell(score: Scores, row: Scores) -> Cell:
    low, high = score["difference_interval"]
    verdict = ""
    if low > 0 or high < 0:
        verdict = "better" if (low > 0) == row["more_is_better"] else "worse"
    value = f"{row['scale'] * score['value']:.1f}"
    bar = (score["value"], *score["interval"])
    return Cell(value, difference(score, row["scale"]), verdict, bar)


def difference(score: Scores, scale: int = 100) -> str:
    """Return the difference from the baseline, multiplied by ``scale``, with its 95 % interval."""
    low, high = score["difference_interval"]
    # z: no minus before a zero
    return f"{scale * score['difference']:+z.1f} [{scale * low:+z.1f}, {scale * high:+z.1f}]"


def units_note(scores: Scores) -> str:
    """Return the units of the table and what its intervals rest on."""
    clusters = dict.fromkeys(task["cluster"] for task in scores["tasks"].values())
    return (
        "percent unless the label names a unit; differences from the baseline in points, "
        f"95 % paired bootstrap by {' and '.join(clusters)}"
    )


def cut_note(scores: Scores) -> str:
    """Return how many answers of each model reached the limit on their length; empty when none
    did.
    """
    tasks = scores["tasks"].values()
    cut: Counter[str] = Counter()
    for task in tasks:
        cut.update(task["cut"])
    if not any(cut.values()):
        return ""
    counts = ", ".join(f"{model} {count:,}" for model, count in cut.items())
    items = sum(task["items"] for task in tasks)
    return f"Of {items:,} answers, cut at max_new_tokens: {counts}."


def scores_table(scores: Scores) -> Table:
    """Return the paired comparison as a rich table; bold where the interval excludes 0 on the
    better side.
    """
    table = Table(title=units_note(scores), caption=cut_note(scores) or None)
    table.add_column("")
    rows = list(score_rows(scores))
    for model in rows[0][1]:
        table.add_column(model, justify="right")
    for row, cells in rows:
        texts = [
            Text(f"{cell.value}  {cell.difference}".rstrip(), STYLES[cell.verdict])
            for cell in cells.values()
        ]
        table.add_row(row["label"], *texts)
    return table
