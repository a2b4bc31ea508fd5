"""A comparison of models as a table for the terminal."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any

from rich.console import Group, RenderableType
from rich.table import Table
from rich.text import Text

from realign.evaluation.cluster_sums import COUNTS, SAID_YES
from realign.evaluation.table import UNDEFINED, noise_note, split_of, unit_note

FEW_RUNS = 5
Found = Mapping[str, Any]
COLUMNS = (  # with their widths, 80 characters together
    ("model", 14),
    ("score\n± SE\n[interval]", 16),
    ("difference\ndetectable\n[interval]", 18),
    ("gained\nlost\nnet", 6),
    ("p McNemar\np by cluster\np Holm", 12),
    ("inside\nthe noise", 9),
)


def comparison_table(scores: Found) -> RenderableType:
    """Return the result of :func:`realign.evaluation.compare` as a table, with its basis."""
    ((name, benchmark),) = scores["benchmarks"].items()
    ((rule, by),) = benchmark["rules"].items()
    subset = f", subset {benchmark['subset']}" if benchmark["subset"] else ""
    decimals = 4 if by["unit"] == "fraction" else 2
    parts: list[RenderableType] = [
        Text(f"{name}, rule {rule}, data version {benchmark['version']}{subset}", "italic"),
        _columns(show_header=True),
    ]
    for row in scores["table"]:
        split = split_of(scores, row)
        counts = f"{split['items']:,} answers on {split['images']:,} images"
        parts += [Text(f"{row['label']}: {counts}", "bold")]
        table = _columns(show_header=False)
        for model in scores["models"]:
            _add_model(table, scores, row, split, model, decimals)
        for answer, metrics in split["constants"].items():
            value = _number(metrics[row["metric"]], decimals)
            table.add_row(Text(f"all {answer}"), value, style="dim")
        parts.append(table)
    return Group(*parts, *(Text(line) for line in _notes(scores, benchmark, by)))


def _columns(*, show_header: bool) -> Table:
    table = Table(box=None, padding=(0, 1, 0, 0), show_header=show_header)
    for head, width in COLUMNS:
        # data may hold what rich takes for styles; a number is never cut
        side: Any = "left" if width == COLUMNS[0][1] else "right"
        table.add_column(Text(head), justify=side, overflow="fold", width=width)
    return table


def _add_model(
    table: Table, scores: Found, row: Found, split: Found, model: str, decimals: int
) -> None:
    metrics = split["models"][model]
    entry = metrics[row["metric"]]
    test = row["comparisons"].get(model)
    name = model
    if SAID_YES in metrics and metrics[SAID_YES]["value"] is not None:
        name += f"\nyes {metrics[SAID_YES]['value']:.4f}"
    is_base = model == scores["baseline"]
    table.add_row(Text(name), *_cells(entry, test, decimals, is_base=is_base))
    if graded := entry["gradings"]:
        low, high, deviation = (_number(graded[key], decimals) for key in ("min", "max", "sd"))
        number = len(graded["values"])
        table.add_row(f"  {number} gradings", f"{low} to {high}\nsd {deviation}", style="dim")
    for run, found in (entry["runs"] or {}).items():
        cells = _cells(found, None, decimals, is_base=is_base)
        table.add_row(Text(f"  run {run}"), *cells, style="dim")


def _cells(entry: Found, test: Found | None, decimals: int, *, is_base: bool) -> Iterator[str]:
    error = entry["clustered_standard_error"]
    if error is None:
        error = entry["bootstrap_standard_error"]
    if error is None:
        error = entry["standard_error"]
    score = _number(entry["value"], decimals)
    yield f"{score}\n± {_number(error, decimals)}\n{_interval(entry['interval'], decimals)}"
    if is_base:
        return
    paired = entry["paired"] or {}
    detectable = _number(paired.get("minimum_detectable"), decimals)
    shown = _number(entry["difference"], decimals, sign="+")
    yield f"{shown}\n{detectable}\n{_interval(entry['difference_interval'], decimals, sign='+')}"
    gained, lost, net = (paired.get(key) for key in ("gained", "lost", "net"))
    yield UNDEFINED if gained is None else f"{gained:,}\n{lost:,}\n{net:+,}"
    by_seed = paired["p"] if paired.get("test") == "t over seeds" else None
    lines = [_p(paired.get("p_mcnemar")), _p(paired.get("p_permutation"))]
    if by_seed is not None:
        lines = [f"t {_p(by_seed)}"]
    yield "\n".join([*lines, _p(test["p_holm"])] if test else lines)
    yield "" if test is None else ("yes" if test["is_inside_noise"] else "no")


def _number(value: float | None, decimals: int, sign: str = "") -> str:
    return UNDEFINED if value is None else f"{value:{sign}z.{decimals}f}"


def _interval(interval: list[float] | None, decimals: int, sign: str = "") -> str:
    if interval is None:
        return UNDEFINED
    return f"[{', '.join(_number(bound, decimals, sign) for bound in interval)}]"


def _p(value: float | None) -> str:
    if value is None:
        return UNDEFINED
    return f"{value:.4f}" if value >= 0.00005 else f"{value:.0e}"


def _notes(scores: Found, benchmark: Found, by: Found) -> Iterator[str]:
    draws = scores["draws"]
    has_counts = any(row["metric"] in COUNTS for row in scores["table"])
    yield unit_note(by["unit"], by["note"], has_counts=has_counts)
    is_compared = len(scores["models"]) > 1
    differences = f"Differences are from {scores['baseline']}. " if is_compared else ""
    yield (
        f"{differences}Intervals: {100 * scores['confidence']:.0f} % "
        f"percentiles of {draws['bootstrap']:,} draws (seed {draws['seed']}) of "
        f"{benchmark['clusters']:,} clusters by {benchmark['cluster']}, the same for all models "
        "and splits. SE: clustered, or the standard deviation of the draws where the metric is no "
        "mean."
    )
    if noise := noise_note(scores):
        yield f"{noise} Detectable: the smallest difference that is found with 80 % power."
    runs = {
        len(entry["runs"])
        for row in scores["table"]
        for metrics in split_of(scores, row)["models"].values()
        if (entry := metrics[row["metric"]])["runs"]
    }
    if runs:
        few = f"; {min(runs)} are few" if min(runs) < FEW_RUNS else ""
        yield (
            "The score of a model with several runs is their mean, with the t-interval over runs, "
            f"which are never pooled with items{few}. Below it, each run with its interval over "
            "items."
        )
    if left_out := _left_out(scores):
        yield f"Draws left out of intervals, since the metric is not defined: {left_out}."
    constants = [split_of(scores, row)["constants"] for row in scores["table"]]
    if any(constants):
        yield "Below the models stand the scores of constant answers, which need no image."
    if any(
        SAID_YES in split_of(scores, row)["constants"].get("yes", ()) for row in scores["table"]
    ):
        yield "Below the name of a model: the share of its answers that the rule reads as yes."


def _left_out(scores: Found) -> str:
    return "; ".join(
        f"{row['label']}, {model}: {entry['undefined_draws']:,} of the score, "
        f"{entry['difference_undefined_draws']:,} of the difference"
        for row in scores["table"]
        for model, metrics in split_of(scores, row)["models"].items()
        if (entry := metrics[row["metric"]])["value"] is not None
        and (entry["undefined_draws"] or entry["difference_undefined_draws"])
    )
