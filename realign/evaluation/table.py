"""Print scores as a table in the terminal."""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any, NamedTuple

from rich.console import Console, ConsoleOptions, Group, RenderableType, RenderResult
from rich.measure import Measurement
from rich.table import Table
from rich.text import Text

from realign.errors import RefusedError
from realign.evaluation.cluster_sums import SAID_YES
from realign.runtime.files import read_utf8

SCHEMA = 3  # of scores.json
UNDEFINED = "—"  # shown instead of a value, followed by the reason
NARROW_WIDTHS = (15, 7, 22, 16, 15)  # 80 characters with the spaces between
MANY_COLUMNS = 10_000  # width of a terminal in which everything fits
STYLES = {"better": "bold green", "worse": "bold", "noise": "", "": ""}
Scores = Mapping[str, Any]


def read_scores(path: Path) -> Scores:
    """Read ``scores.json``.

    Raises:
        RefusedError: Another version wrote it, or it is not a JSON object.
    """
    try:
        scores: Any = json.loads(read_utf8(path))
    except json.JSONDecodeError as error:
        scores = str(error)
    if not isinstance(scores, dict):
        raise RefusedError(
            f"{path} must hold a JSON object, got {scores!r:.80}. Give the same `realign eval` "
            "again; it scores the stored answers anew."
        )
    if scores.get("schema") != SCHEMA:
        raise RefusedError(
            f"{path} must have schema {SCHEMA}, got {scores.get('schema', 1)}. Give the same "
            "`realign eval` or `realign demo` again; it scores the stored answers anew."
        )
    return scores


def split_of(scores: Scores, row: Scores) -> Scores:
    """Return the entry of ``scores.json`` for the split and the rule of a row of its table."""
    found: Scores = scores["benchmarks"][row["benchmark"]]["rules"][row["rule"]]
    split: Scores = found["splits"][row["split"]]
    return split


class Fitting(NamedTuple):
    """Two forms of the same numbers; the width of the terminal decides which one is shown.

    Attributes:
        wide: Table to show if it fits without breaking a line in a cell.
        narrow: Form to show otherwise.
    """

    wide: Table
    narrow: RenderableType

    def __rich_console__(self, console: Console, options: ConsoleOptions) -> RenderResult:
        needed = Measurement.get(console, options.update(width=MANY_COLUMNS), self.wide).maximum
        yield self.wide if needed <= options.max_width else self.narrow


class Cell(NamedTuple):
    """A score as it is printed."""

    value: str
    # difference from the baseline with its 95 % interval, empty for the baseline itself; or the
    # reason why the value or the difference is undefined
    difference: str
    verdict: str  # "better", "worse" or "noise", adjusted for all comparisons of the table
    bar: tuple[float, float, float] | None  # value and interval; None for an undefined value


def score_rows(scores: Scores) -> Iterator[tuple[Scores, dict[str, Cell]]]:
    """Yield each row of the table (see :class:`~realign.evaluation.benchmark.TableRow`) with its
    cell by model.
    """
    for row in scores["table"]:
        metric, baseline = row["metric"], scores["baseline"]
        cells = {
            model: _cell(metrics[metric], row, baseline, row["comparisons"].get(model))
            for model, metrics in split_of(scores, row)["models"].items()
        }
        yield row, cells


def _cell(score: Scores, row: Scores, baseline: str, test: Scores | None) -> Cell:
    value, interval = score["value"], score["interval"]
    if value is None:
        return Cell(UNDEFINED, row["undefined"], "", None)
    shown = f"{row['scale'] * value:.1f}"
    bar = (value, *(interval or (value, value)))
    if score["difference"] is None:
        return Cell(shown, f"{UNDEFINED} {baseline} has no value to compare with", "", bar)
    if score["paired"] is None:
        return Cell(shown, "", "", bar)  # the baseline itself
    if not score["difference_interval"]:
        return Cell(shown, f"{row['scale'] * score['difference']:+z.1f}", "", bar)
    verdict = ""
    if test is not None:
        is_up = score["difference"] > 0
        verdict = "better" if is_up == row["more_is_better"] else "worse"
        verdict = "noise" if test["is_inside_noise"] else verdict
    return Cell(shown, difference(score, row["scale"]), verdict, bar)


def difference(score: Scores, scale: int = 100) -> str:
    """Return the difference from the baseline, multiplied by ``scale``, with its 95 % interval.

    The score must have both.
    """
    low, high = score["difference_interval"]
    # z: no minus before a zero
    return f"{scale * score['difference']:+z.1f} [{scale * low:+z.1f}, {scale * high:+z.1f}]"


UNITS = {"fraction": "fractions", "percent": "in percent", "points": "in points"}


def unit_note(unit: str, note: str, *, has_counts: bool) -> str:
    """Return the unit of a rule's values and the rule's note.

    Args:
        unit: One of :attr:`realign.evaluation.benchmark.Rule.unit`.
        note: Note of the rule; may be empty.
        has_counts: Whether counts, which have no unit, are also shown.
    """
    besides = ", except for counts" if has_counts else ""
    return f"Values are {UNITS[unit]}{besides}. {note}".rstrip()


def units_note(scores: Scores) -> str:
    """Return the units of the table and the basis of its intervals."""
    clusters = dict.fromkeys(found["cluster"] for found in scores["benchmarks"].values())
    by = f" by {' and '.join(clusters)}" if clusters else ""
    return (
        "percent unless the label names a unit; differences from the baseline in points, "
        f"95 % paired bootstrap{by}"
    )


def noise_note(scores: Scores) -> str:
    """Return a note about the number of comparisons for which verdicts are adjusted; empty if there
    are none.
    """
    number = scores["num_comparisons"]
    if not number:
        return ""
    note = (
        "Inside the noise: the interval contains 0, or p is above 0.05, when adjusted for the "
        f"{number:,} comparison{'s' if number > 1 else ''} of this table (Holm)."
    )
    draws = scores["draws"]["permutation"]
    if number / (draws + 1) > 1 - scores["confidence"]:
        note += f" {draws:,} draws are too few for so many: no p by cluster can be small enough."
    return note


def constants_note(scores: Scores, row: Scores) -> str:
    """Return the scores of constant answers in a row of the table; empty without any."""
    constants = split_of(scores, row)["constants"]
    values = {name: metrics[row["metric"]] for name, metrics in constants.items()}
    return ", ".join(
        f"all {name} {UNDEFINED if value is None else format(row['scale'] * value, '.1f')}"
        for name, value in values.items()
    )


def said_yes_note(scores: Scores, row: Scores, model: str) -> str:
    """Return the share of a model's answers that a row's rule reads as yes; empty if the rule does
    not read yes and no.
    """
    share = split_of(scores, row)["models"][model].get(SAID_YES, {}).get("value")
    return "" if share is None else f"says yes {100 * share:.1f} %"


def cut_note(scores: Scores) -> str:
    """Return how many answers of each model reached the length limit; empty if none did."""
    tasks = scores["tasks"].values()
    cut: Counter[str] = Counter()
    for task in tasks:
        cut.update(task["cut"])
    if not any(cut.values()):
        return ""
    counts = ", ".join(f"{model} {count:,}" for model, count in cut.items())
    items = sum(task["items"] for task in tasks)
    return f"Of {items:,} answers, cut at max_new_tokens: {counts}."


def draws_note(scores: Scores) -> str:
    """Return how many bootstrap draws intervals leave out, since the metric is undefined in them;
    empty if none are left out.
    """
    found = []
    for row in scores["table"]:
        counts = {
            model: score["undefined_draws"]
            for model, metrics in split_of(scores, row)["models"].items()
            if (score := metrics[row["metric"]])["value"] is not None
        }
        if any(counts.values()):
            shown = ", ".join(f"{model} {count:,}" for model, count in counts.items())
            found.append(f"{row['label']} ({row['undefined']}): {shown}")
    return f"Draws left out of intervals: {'; '.join(found)}." if found else ""


def scores_table(scores: Scores) -> Fitting:
    """Return the paired comparison for the terminal: bold if a difference is not inside the noise,
    and green if it is also an improvement.
    """
    notes = [cut_note(scores), draws_note(scores), noise_note(scores)]
    caption = " ".join(filter(None, notes))
    rows = list(score_rows(scores))
    table = Table(title=units_note(scores), caption=caption or None)
    table.add_column("")
    for model in scores["models"]:
        table.add_column(Text(model), justify="right")
    for row, cells in rows:
        texts = []
        for model, cell in cells.items():
            lines = [f"{cell.value}  {cell.difference}".rstrip(), said_yes_note(scores, row, model)]
            lines += ["inside the noise"] if cell.verdict == "noise" else []
            texts.append(Text("\n".join(filter(None, lines)), STYLES[cell.verdict]))
        label = "\n".join(filter(None, (row["label"], constants_note(scores, row))))
        table.add_row(Text(label), *texts)
    return Fitting(table, _narrow_scores(scores, rows, caption))


def _narrow_scores(
    scores: Scores, rows: Iterable[tuple[Scores, Mapping[str, Cell]]], caption: str
) -> RenderableType:
    """Return one line per model below each metric, at most 80 characters wide."""
    header = _narrow_columns()
    header.add_row("model", "score", "difference", style="bold")
    parts: list[RenderableType] = [Text(f"{units_note(scores)}\n", "italic"), header]
    for row, cells in rows:
        constants = constants_note(scores, row)
        parts.append(Text(f"\n{row['label']}", "bold"))
        parts += [Text(constants, "dim")] if constants else []
        table = _narrow_columns()
        for model, cell in cells.items():
            verdict = "inside the noise" if cell.verdict == "noise" else cell.verdict
            said_yes = said_yes_note(scores, row, model)
            texts = (model, cell.value, cell.difference, verdict, said_yes)
            table.add_row(*map(Text, texts), style=STYLES[cell.verdict])
        parts.append(table)
    return Group(*parts, *([Text(f"\n{caption}", "italic")] if caption else []))


def _narrow_columns() -> Table:
    table = Table(box=None, padding=(0, 1, 0, 0), show_header=False)
    for width in NARROW_WIDTHS:
        table.add_column(width=width, overflow="fold")
    return table
