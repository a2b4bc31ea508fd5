"""The definition of a benchmark: its files and their readers, the score of an answer under each
named rule, and the rows of the table.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Hashable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import ArrayLike, NDArray

from realign.errors import RefusedError
from realign.evaluation.judging import Judge, Judging, Replies, stored_replies
from realign.evaluation.rows import Row, row_id

Array = NDArray[np.float64]
Metrics = Callable[[Array], Mapping[str, Array]]
ScoredRow = tuple[Row, Sequence[float]]
Record = Mapping[str, Any]  # of an answer file


def sum_scores(rows: Sequence[ScoredRow]) -> ArrayLike:
    """Return the sum of the score vectors of a cluster."""
    # there are few short vectors, for which NumPy is slower
    return [sum(column) for column in zip(*(scores for _, scores in rows), strict=True)]


class UnitValues(NamedTuple):
    """The units that a metric is the mean of: questions, or groups that are right as a whole."""

    of_cluster: Callable[[Sequence[ScoredRow]], Sequence[float]]
    """Map the scored rows of a cluster to one value per unit, in an order independent of the
    scores; for binary units 1 if right and 0 if wrong.
    """
    scale: float = 1.0
    """Factor from the mean of the values to the metric, such as 100 for percent."""


def of_items(value: Callable[[Sequence[float]], float], scale: float = 1.0) -> UnitValues:
    """Return the units of a metric that is the mean over rows of a value of the score vector."""
    return UnitValues(lambda rows: [float(value(scores)) for _, scores in rows], scale)


@dataclass(frozen=True)
class Rule:
    """A named way to score stored answers."""

    score: Callable[[Row, str], Sequence[float]]
    """Map a row and its answer to a score vector, whose length K is the rule's own."""
    metrics: Metrics
    """Map score vectors summed over clusters, shape ``(..., K)``, to named values, shape ``(...)``.
    A value whose denominator is 0 is NaN or infinite, without a warning of NumPy.
    """
    split_metrics: Mapping[str, Metrics] = field(default_factory=dict)
    """Metrics of splits in which the published program computes them in another way."""
    combine: Callable[[Sequence[ScoredRow]], ArrayLike] = sum_scores
    """Map the scored rows of a cluster to its score vector. A rule that counts groups in which
    every answer is right does so here.
    """
    cluster: str = ""
    """Key of a row that names its cluster under this rule; empty for the benchmark's. Groups that a
    rule counts never cross clusters.
    """
    unit: str = "fraction"
    """Unit of the values that are not counts: ``fraction``, ``percent`` or ``points``."""
    says_yes: Callable[[str], bool] | None = None
    """Return whether an answer is read as yes. None for benchmarks without yes/no questions."""
    covers: Callable[[Row], bool] = lambda row: True
    """Return whether the rule scores a row. Some programs leave out questions without an image."""
    strips: bool = True
    """True if white space around an answer is removed before the answer is scored."""
    judging: Judging | None = None
    """The way the rule reads the replies of a judge. None for a rule that reads the answers."""
    needs_packages: bool = False
    """True if the rule requires packages that this project does not install. ``realign eval``
    leaves it out, so that no score depends on the machine; stored answers can be scored by it.
    """
    units: Mapping[str, UnitValues] = field(default_factory=dict)
    """The units of each metric that is a mean. Comparisons of such a metric count the gained and
    lost units, and its standard error has a closed form. Other metrics have only intervals and
    permutation tests.
    """
    note: str = ""
    """Text that is printed beside the scores, such as a fault of the published program."""

    def prepare(self, answer: str) -> str:
        """Return an answer as the rule reads it."""
        return answer.strip() if self.strips else answer


class MissingData(RefusedError):
    """A folder has no file of a benchmark."""


class TableRow(NamedTuple):
    """A metric that is shown; the others are only in ``scores.json``."""

    task: str  # the row is shown where this task is measured
    rule: str
    metric: str
    label: str
    more_is_better: bool = True
    is_headline: bool = False  # also shown as a tile and a plot
    scale: int = 100  # 100 prints a fraction in percent; with 1 the label names the unit
    undefined: str = "there was nothing to count"  # the reason if the metric has no value
    split: str = "all"  # the split of the metric


class Prompt(NamedTuple):
    """The text that a program sends for a question, and the limit on the length of the answer."""

    text: Callable[[Row], str] = lambda row: str(row["text"])
    max_new_tokens: int = 128


class View(NamedTuple):
    """An answer as a reader sees it."""

    truth: str
    is_right: bool
    absent_words: tuple[str, ...] = ()  # marked in the answer


@dataclass(frozen=True)
class Layout:
    """One arrangement of the files of a benchmark in a folder."""

    files: Mapping[str, tuple[str, ...]]
    """Names of the files of each task. A task is measured if the first of them exists."""
    read: Callable[..., list[Row]]
    """Read and check the first file of a task, and those beside it that the task needs."""
    are_folders: bool = False
    """True if the names are those of folders instead of files."""
    takes_named: bool = False
    """True if ``read`` also takes a function that returns the keys of the questions that answers
    name. This is for files that hold far more than a benchmark asks for.
    """

    def holds(self, path: Path) -> bool:
        """Return whether the first file or folder of a task exists."""
        return path.is_dir() if self.are_folders else path.is_file()

    def first_in(self, folder: Path) -> str | None:
        """Return the first file or folder of a task that a folder holds, or None."""
        first = (names[0] for names in self.files.values())
        return next((name for name in first if self.holds(folder / name)), None)


@dataclass(frozen=True)
class AnswerFormat:
    """One format of the records of answer files. A record is joined to its question by a key."""

    fields: tuple[str, ...]
    """The fields that every record must have."""
    answer: str | None
    """The field of the answer; None for files that hold only the replies of a judge."""
    key: Callable[[Record], Hashable]
    """The key of the question that a record answers."""
    row_key: Callable[[Row], Hashable | None]
    """Return the key of a row, or None if rows of this layout have no such key."""
    reply_fields: tuple[str, ...] = ()
    """Further fields that every record must have, which hold the replies of a judge."""
    is_in_order: bool = False
    """True if a file holds the answers of one task, or of all tasks, in the order of the questions.
    Its keys are compared with those of the questions one by one, so that they need not be unique.
    """


STORED_ANSWERS = AnswerFormat(
    ("benchmark", "id", "answer"), "answer", lambda record: str(record["id"]), row_id
)
"""The format that ``realign eval`` stores."""
OWN_ANSWERS = AnswerFormat(
    ("image", "text", "answer"),
    "answer",
    lambda record: (record["image"], record["text"]),
    lambda row: (row["image"], row["text"]),
)
"""The format of earlier versions. One answer serves all rows with its image and text."""
ANSWERS_BY_ID = AnswerFormat(
    ("id", "answer"), "answer", lambda record: str(record["id"]), lambda row: row.get("id")
)


@dataclass(frozen=True, eq=False)
class Benchmark:
    """A benchmark: everything that differs between benchmarks."""

    name: str
    """The name on the command line and in JSON, such as ``pope``."""
    title: str
    """The name in tables and messages, such as ``POPE``."""
    layouts: Sequence[Layout]
    """Layouts of its files, of which the first that a folder has is read."""
    rules: Mapping[str, Rule]
    table: Sequence[TableRow]
    prompts: Mapping[str, Prompt] = field(default_factory=lambda: {"official": Prompt()})
    """Prompts by the name of their program. The first is the default. A benchmark without prompts
    is scored from files and not asked.
    """
    image_folder: str = ""
    """The folder below ``--images`` that may hold the images; the benchmark's name by default."""
    image_places: Callable[[Row], Sequence[str]] = lambda row: (row["image"],)
    """Return the possible paths of a row's image below that folder, or below ``--images``."""
    read_images: Callable[[Path], Iterator[tuple[str, bytes]]] | None = None
    """Read the images in a task's first file, by the names that rows have."""
    cluster: str = "image"
    """The key of a row that names its cluster. The bootstrap draws clusters."""
    samples: Mapping[str, Callable[[Row, str], View]] = field(default_factory=dict)
    """Views of a row's answer by task, for tasks whose answers the report shows side by side."""
    splits: Callable[[str, Row], Sequence[str]] = lambda task, row: ("all",)
    """The splits that a row of a task belongs to."""
    means: Mapping[str, Sequence[str]] = field(default_factory=dict)
    """Splits whose metrics are averaged under a name, as in published tables."""
    headline: tuple[str, ...] = ()
    """The metrics that ``realign eval compare`` compares by default; empty for every metric that is
    not a count.
    """
    less_is_better: tuple[str, ...] = ()
    """Metrics of which a smaller value is better."""
    version_keys: tuple[str, ...] = ("image", "text")
    """The keys of a row that its score depends on."""
    versions: Mapping[str, str] = field(default_factory=dict)
    """:func:`realign.evaluation.rows.rows_digest` of the published rows of a task, by those keys,
    to the name of that version.
    """
    answer_reader: Callable[[Path], list[tuple[str, Record]] | None] = lambda path: None
    """Read the records of an answer file that is neither JSON nor a table; None for other files."""
    answer_formats: Sequence[AnswerFormat] = ()
    """Formats of answer files of other programs; the formats above are always read."""
    constants: Mapping[str, str] = field(default_factory=dict)
    """Constant answers, whose scores are shown beside every score."""
    replies: Callable[[Record], Replies] = stored_replies
    """Return the replies of judges about the answer of a record, one per grading. None means that
    the file was not judged.
    """
    judge: Judge | None = None
    """The way in which a judge is asked; None for benchmarks without a judge."""

    def find_layout(self, data: Path) -> Layout:
        """Return the first layout of which a folder holds a file.

        Raises:
            MissingData: There is none.
        """
        for layout in self.layouts:
            if layout.first_in(data):
                return layout
        wanted = "; or ".join(
            ", ".join(names[0] for names in layout.files.values()) for layout in self.layouts
        )
        raise MissingData(
            f"data must hold the files of {self.title} ({wanted}), got {data}, which has none of "
            "them. Check --data."
        )

    def read_tasks(
        self, data: Path, named: Callable[[], Collection[str]] = tuple
    ) -> dict[str, Task]:
        """Read the rows of every task whose files a folder holds.

        Args:
            data: The folder, or one that holds the folder with the benchmark's name.
            named: Returns the keys of the questions that answers name.
        Raises:
            MissingData: The folder has none.
            RefusedError: A file has another form.
        """
        nested = data / self.name
        if not any(one.first_in(data) for one in self.layouts) and nested.is_dir():
            data = nested
        layout, tasks = self.find_layout(data), {}
        for name, files in layout.files.items():
            if layout.holds(data / files[0]):
                more = (named,) if layout.takes_named else ()
                rows = layout.read(data / files[0], *more)
                for row in rows:
                    row["splits"] = self.splits(name, row)
                    row["item"] = (self.name, row_id(row))
                tasks[name] = Task(self, rows, files)
        return tasks


class Task(NamedTuple):
    """The rows of one task of a benchmark."""

    benchmark: Benchmark
    rows: list[Row]
    files: tuple[str, ...] = ()
    """Names of the files that the rows were read from."""
