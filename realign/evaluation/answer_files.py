"""Answer files of any program, joined to the questions of a benchmark: by id or by text, never by
position alone.
"""

from __future__ import annotations

from collections.abc import Callable, Hashable, Iterable, Sequence
from pathlib import Path
from typing import NamedTuple

from realign.errors import RefusedError
from realign.evaluation.benchmark import (
    ANSWERS_BY_ID,
    OWN_ANSWERS,
    STORED_ANSWERS,
    AnswerFormat,
    Benchmark,
    Record,
)
from realign.evaluation.judging import Replies, Reply
from realign.evaluation.rows import Row, check_ids, read_records, read_table

Tasks = dict[str, list[Row]]


class Answered(NamedTuple):
    """A row with its answer and what judges replied about it."""

    row: Row
    answer: str
    replies: Replies = ()
    """One reply per grading; a file without a reply about this answer gives one without text."""


def read_answers(
    benchmark: Benchmark,
    paths: Sequence[Path],
    tasks: Tasks,
    *,
    covers: Callable[[Row], bool],
    allows_subset: bool,
    others: Sequence[Row] = (),
) -> list[Answered]:
    """Read the answers to a benchmark's questions.

    Several files may hold gradings of the same answers by a judge.

    Args:
        benchmark: Benchmark that defines the formats.
        paths: One or more files, which together hold the answers.
        tasks: Rows of each task.
        covers: Whether a row is scored. Answers to other rows may be there or not.
        allows_subset: Whether questions may be left out.
        others: Rows of another part of the benchmark; their answers are ignored.
    Returns:
        answered: Each row to score that has an answer, in the order of the rows.
    Raises:
        RefusedError: A file has no known format, its answers are not those of the questions, or two
            questions have one id.
    """
    check_ids(tasks)
    found = _Found()
    if twice := [path for i, path in enumerate(paths) if path.resolve() in _resolved(paths[:i])]:
        raise RefusedError(f"answers must be files named once, got {twice[0]} twice. Name it once.")
    for path in paths:
        records = benchmark.answer_reader(path) or _records(path)
        if others and not _own(records, benchmark):
            continue  # the file holds the answers to another part
        records = _of_benchmark(records, benchmark, path)
        form = _format_of(records, benchmark, path)
        keys = {form.row_key(row) for row in others}
        records = [item for item in records if not keys or form.key(item[1]) not in keys]
        pairs = (
            _in_order(form, records, tasks, path, allows_subset=allows_subset)
            if form.is_in_order
            else _by_key(form, records, tasks)
        )
        found.begin_file()
        for where, record, rows in pairs:
            found.add(where, rows, _answer(form, record, where), _replies(benchmark, record, where))
    all_rows = [row for rows in tasks.values() for row in rows if covers(row)]
    missing = [row for row in all_rows if id(row) not in found.answers]
    if found.unknown or found.repeated or (missing and not allows_subset):
        faults = (missing, found.unknown, found.repeated)
        _refuse(paths, len(all_rows), len(all_rows) - len(missing), *faults)
    return [
        Answered(row, found.answers[id(row)] or "", found.replies(row))
        for row in all_rows
        if id(row) in found.answers
    ]


def _resolved(paths: Sequence[Path]) -> set[Path]:
    return {path.resolve() for path in paths}


class _Found:
    """The answers of the files read so far; rows are known by their ``id()``.

    An answer may be given once, or by several files that grade it: all but one of these must then
    hold replies of a judge about it.
    """

    def __init__(self) -> None:
        self.answers: dict[int, str | None] = {}
        self.unknown: list[str] = []
        self.repeated: list[str] = []
        self._gradings: list[dict[int, Replies]] = []
        self._numbers: list[int] = []  # of gradings in each file

    def begin_file(self) -> None:
        self._gradings.append({})
        self._numbers.append(0)

    def add(self, where: str, rows: Sequence[Row], answer: str | None, replies: Replies) -> None:
        if not rows:
            self.unknown.append(where)
        if any(self._is_repeated(id(row), answer, replies) for row in rows):
            self.repeated.append(where)
        self._numbers[-1] = max(self._numbers[-1], len(replies))
        for row in rows:
            self._gradings[-1][id(row)] = replies
            if self.answers.get(id(row)) is None:
                self.answers[id(row)] = answer

    def _is_repeated(self, key: int, answer: str | None, replies: Replies) -> bool:
        if key not in self.answers:
            return False
        other = self.answers[key]
        is_other = None not in (answer, other) and answer != other
        is_graded = bool(replies) or any(found.get(key) for found in self._gradings)
        return key in self._gradings[-1] or is_other or not is_graded

    def replies(self, row: Row) -> Replies:
        """Return the replies about a row's answer, as many for every row."""
        gathered: list[Reply] = []
        for found, number in zip(self._gradings, self._numbers, strict=True):
            own = found.get(id(row), ())
            gathered += [*own, *[Reply(None)] * (number - len(own))]
        return gathered


def _answer(form: AnswerFormat, record: Record, where: str) -> str | None:
    if form.answer is None:
        return None
    answer = record[form.answer]
    if not isinstance(answer, str):
        raise RefusedError(
            f"{where}: {form.answer} must be a string, got {answer!r:.80}. Correct it."
        )
    return answer


def _replies(benchmark: Benchmark, record: Record, where: str) -> Replies:
    try:
        return benchmark.replies(record)
    except RefusedError as error:
        lines = f"{where}: {error}"
        raise RefusedError(lines) from None


def holds_answers(benchmark: Benchmark, paths: Sequence[Path], rows: Sequence[Row]) -> bool:
    """Return whether files hold an answer to one of some rows.

    Raises:
        RefusedError: A file has no known format.
    """
    for path in paths:
        records = benchmark.answer_reader(path) or _own(_records(path), benchmark)
        if not records:
            continue
        form = _format_of(records, benchmark, path)
        keys = {form.row_key(row) for row in rows}
        if any(form.key(record) in keys for _, record in records):
            return True
    return False


def named_questions(benchmark: Benchmark, paths: Sequence[Path]) -> set[str]:
    """Return the keys of the questions that answer files name, as their formats have them.

    Raises:
        RefusedError: A file has no known format.
    """
    keys: set[str] = set()
    for path in paths:
        records = benchmark.answer_reader(path) or _own(_records(path), benchmark)
        if not records:
            continue
        form = _format_of(records, benchmark, path)
        keys.update(str(form.key(record)) for _, record in records)
    return keys


def _records(path: Path) -> list[tuple[str, Record]]:
    if not path.is_file():
        raise RefusedError(f"answers must be a file, got {path}, which is none. Check --answers.")
    if path.suffix in (".tsv", ".csv"):
        return [*read_table(path)]
    if path.suffix == ".xlsx":
        raise RefusedError(
            f"answers must be JSON, JSON lines, .tsv or .csv, got {path.name}. Save the sheet as "
            "tab-separated values."
        )
    records = read_records(path)
    for where, record in records:
        if not isinstance(record, dict):
            raise RefusedError(
                f"{where} must be a JSON object, got {record!r:.80}. Correct it, or give the file "
                "that holds one answer in each line."
            )
    return records


def _own(records: list[tuple[str, Record]], benchmark: Benchmark) -> list[tuple[str, Record]]:
    """Leave out the answers to other benchmarks, which ``realign eval`` stores in the same file."""
    return [pair for pair in records if pair[1].get("benchmark", benchmark.name) == benchmark.name]


def _of_benchmark(
    records: list[tuple[str, Record]], benchmark: Benchmark, path: Path
) -> list[tuple[str, Record]]:
    """Leave out the answers to other benchmarks.

    Raises:
        RefusedError: None is left.
    """
    names = {record["benchmark"]: None for _, record in records if "benchmark" in record}
    own = _own(records, benchmark)
    if not own:
        raise RefusedError(
            f"{path} must hold answers of {benchmark.name}, got those of "
            f"{', '.join(map(str, names))}. Name one of these as --benchmark."
        )
    return own


def _format_of(
    records: Sequence[tuple[str, Record]], benchmark: Benchmark, path: Path
) -> AnswerFormat:
    """Return the first format that every record of a file has.

    Raises:
        RefusedError: There is none; the record that lacks a field is named.
    """
    # first, since the stored answers have all fields of some other formats
    formats = (STORED_ANSWERS, *benchmark.answer_formats, OWN_ANSWERS, ANSWERS_BY_ID)
    first = records[0][1]
    for form in formats:
        names = (*form.fields, *form.reply_fields)
        if all(name in first for name in names):
            for where, record in records:
                if lacking := [name for name in names if name not in record]:
                    raise RefusedError(
                        f"{where} requires {' and '.join(lacking)}, as the first record of "
                        f"{path.name} has, got only {sorted(record)}. Add what is missing."
                    )
                _check_fields(record, form, where)
            return form
    known = "; ".join(" and ".join((*form.fields, *form.reply_fields)) for form in formats)
    raise RefusedError(
        f"{records[0][0]}: an answer of {benchmark.title} must have one of these sets of fields: "
        f"{known}; got {sorted(first)}. docs/guides/evaluation.md describes the formats."
    )


def _check_fields(record: Record, form: AnswerFormat, where: str) -> None:
    """Refuse lists and objects as keys of questions; the answer is checked later."""
    for name in form.fields:
        if name != form.answer and isinstance(record[name], (dict, list)):
            raise RefusedError(
                f"{where}: {name} must be a string or a number, got {record[name]!r:.80}. Correct "
                "it."
            )


def _by_key(
    form: AnswerFormat, records: Sequence[tuple[str, Record]], tasks: Tasks
) -> Iterable[tuple[str, Record, list[Row]]]:
    rows_of: dict[Hashable, list[Row]] = {}
    for rows in tasks.values():
        for row in rows:
            key = form.row_key(row)
            if key is not None:
                rows_of.setdefault(key, []).append(row)
    for where, record in records:
        yield where, record, rows_of.get(form.key(record), [])


def _in_order(
    form: AnswerFormat,
    records: Sequence[tuple[str, Record]],
    tasks: Tasks,
    path: Path,
    *,
    allows_subset: bool,
) -> Iterable[tuple[str, Record, list[Row]]]:
    """Yield the records of one task, or of all, whose rows have the same keys in the same order."""
    keys = [form.key(record) for _, record in records]
    choices = {**tasks, "all": [row for rows in tasks.values() for row in rows]}
    fitting: dict[int, str] = {}  # by id() of its first row: one split is all of one
    for name, rows in choices.items():
        length = len(rows) if not allows_subset else len(records)
        if len(records) == length and [form.row_key(row) for row in rows[:length]] == keys:
            fitting.setdefault(id(rows[0]), name)
    if len(fitting) != 1:
        sizes = ", ".join(f"{name} {len(rows):,}" for name, rows in choices.items())
        more = "several" if fitting else "none"
        raise RefusedError(
            f"{path} must ask the questions of one split, or of all, in the order of the data "
            f"({sizes}), got {len(records):,} records that fit {more}. Give the file of one run on "
            "this data, or answers with ids."
        )
    rows = choices[next(iter(fitting.values()))]
    for (where, record), row in zip(records, rows, strict=False):
        yield where, record, [row]


def _refuse(
    paths: Sequence[Path],
    expected: int,
    found: int,
    missing: Sequence[Row],
    unknown: Sequence[str],
    repeated: Sequence[str],
) -> None:
    faults = []
    if missing:
        faults.append(f"{len(missing):,} have no answer, first {missing[0]['where']}")
    if unknown:
        faults.append(
            f"{len(unknown):,} answers are to no question of the data, first {unknown[0]}"
        )
    if repeated:
        faults.append(f"{len(repeated):,} answers are to a question again, first {repeated[0]}")
    names = " and ".join(path.name for path in paths)
    remedy = "Give the answers to this data, each once"
    if missing and not unknown and not repeated:
        remedy += ", or pass --allow-subset to score a part"
    raise RefusedError(
        f"{names} must answer each of the {expected:,} questions of the data once, got answers to "
        f"{found:,}: {'; '.join(faults)}. {remedy}."
    )
