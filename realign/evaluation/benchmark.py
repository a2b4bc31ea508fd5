"""The definition of a benchmark: its files and how they are read, what an answer scores under each
named rule, and what the table shows of it.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import ArrayLike, NDArray

from realign.errors import RefusedError
from realign.runtime.strict_json import iter_jsonl

Array = NDArray[np.float64]
Metrics = Callable[[Array], Mapping[str, Array]]
Row = dict[str, Any]  # "image", "text", "where" (its file and line), and keys of its benchmark
ScoredRow = tuple[Row, Sequence[float]]


def sum_scores(rows: Sequence[ScoredRow]) -> ArrayLike:
    """Return the sum of the score vectors of a cluster."""
    return np.sum([scores for _, scores in rows], axis=0)


@dataclass(frozen=True)
class Rule:
    """A named way to score stored answers."""

    score: Callable[[Row, str], Sequence[float]]
    """A row and its answer to a score vector, whose length K is the rule's own."""
    metrics: Metrics
    """Score vectors summed over clusters, shape ``(..., K)``, to named values, shape ``(...)``. A
    value that is not defined, because its denominator is 0, is NaN or infinite; numpy is silent.
    """
    combine: Callable[[Sequence[ScoredRow]], ArrayLike] = sum_scores
    """The scored rows of a cluster to the score vector of the cluster. A rule that counts groups in
    which every answer is right does that here.
    """


class TableRow(NamedTuple):
    """A metric that is shown; the others are in ``scores.json`` alone."""

    task: str
    rule: str
    metric: str
    label: str
    more_is_better: bool = True
    is_headline: bool = False  # also shown as a tile and a plot
    scale: int = 100  # 100 prints a fraction in percent; with 1 the label names the unit
    undefined: str = "there was nothing to count"  # why there is no value, where there is none


class View(NamedTuple):
    """An answer as it is shown to a reader."""

    truth: str
    is_right: bool
    absent_words: tuple[str, ...] = ()  # marked in the answer


@dataclass(frozen=True, eq=False)
class Benchmark:
    """Everything in which one benchmark differs from another."""

    name: str
    files: Mapping[str, tuple[str, ...]]
    """Task to the names of its files. A task is measured where the first of them is."""
    read: Callable[[Path], list[Row]]
    """Read and check the first file of a task, and those beside it that the task needs."""
    rules: Mapping[str, Rule]
    table: Sequence[TableRow]
    cluster: str = "image"
    """The key of a row that names its cluster. The bootstrap draws clusters."""
    samples: Mapping[str, Callable[[Row, str], View]] = field(default_factory=dict)
    """Task to the view of a row's answer, where the report shows answers side by side."""


class Task(NamedTuple):
    """The rows of one task of a benchmark."""

    benchmark: Benchmark
    rows: list[Row]


class Key(NamedTuple):
    """The rule for one value of a row."""

    is_valid: Callable[[Any], bool]
    rule: str
    remedy: str


IMAGE = Key(
    lambda image: isinstance(image, str), "be a file name", "Name a file of the image folder."
)
TEXT = Key(
    lambda text: isinstance(text, str) and text.strip() != "",
    "be a non-empty string",
    "Fill it in.",
)


def read_rows(path: Path, **keys: Key) -> list[Row]:
    """Read a JSON lines file whose rows have ``image``, ``text`` and ``keys``.

    Raises:
        RefusedError: It is empty or not JSON lines, or :func:`check_row` refuses a row.
    """
    keys = {"image": IMAGE, "text": TEXT, **keys}
    rows = []
    for number, row in iter_jsonl(path):
        if isinstance(row, RefusedError):
            raise row
        rows.append(check_row(row, f"{path.name}, line {number}", keys))
    if not rows:
        raise RefusedError(f"{path} must have at least one line, has none. Add some or remove it.")
    return rows


def check_row(row: Any, where: str, keys: Mapping[str, Key]) -> Row:
    """Return a row with ``where`` added, which names its place in a file.

    Raises:
        RefusedError: It is no object, lacks a key or has an invalid value.
    """
    if not isinstance(row, dict):
        raise RefusedError(
            f"{where} must be an object with {[*keys]}, got {row!r:.80}. Correct the line."
        )
    if missing := [name for name in keys if name not in row]:
        raise RefusedError(f"{where}: keys {missing} are missing, found {sorted(row)}. Add them.")
    for name, key in keys.items():
        if not key.is_valid(row[name]):
            raise RefusedError(
                f"{where}: {name} must {key.rule}, got {row[name]!r:.80}. {key.remedy}"
            )
    return {**row, "where": where}
