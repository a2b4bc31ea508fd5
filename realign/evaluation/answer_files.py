"""Answer files of any program, joined to the questions of a benchmark: by id or by text, never by
position alone.
"""

from __future__ import annotations

from collections.abc import Callable, Hashable, Iterable, Sequence
from pathlib import Path

from realign.errors import RefusedError
from realign.evaluation.benchmark import (
    ANSWERS_BY_ID,
    OWN_ANSWERS,
    STORED_ANSWERS,
    AnswerFormat,
    Benchmark,
    Record,
)
from realign.evaluation.rows import Row, read_records, read_table

Tasks = dict[str, list[Row]]


def read_answers(
    benchmark: Benchmark,
    paths: Sequence[Path],
    tasks: Tasks,
    *,
    covers: Callable[[Row], bool],
    allows_subset: bool,
) -> list[tuple[Row, Record, str]]:
    """Read the answers to a benchmark's questions.

    Args:
        benchmark: Which formats are understood.
        paths: One or more files, which together hold the answers.
        tasks: Task to its rows.
        covers: Whether a row is scored. Answers to other rows may be there or not.
        allows_subset: Whether questions may be left out.
    Returns:
        answered: Each row to score that has an answer, in the order of the rows, with the record
            that holds it and the answer.
    Raises:
        RefusedError: A file has no known format, its answers are not those of the questions, or two
            questions have one id.
    """
    _check_ids(tasks)
    found: dict[int, tuple[Record, str]] = {}  # by id() of a row
    unknown: list[str] = []
    repeated: list[str] = []
    for path in paths:
        records = benchmark.answer_reader(path) or _of_benchmark(_records(path), benchmark, path)
        form = _format_of(records, benchmark, path)
        pairs = (
            _in_order(form, records, tasks, path, allows_subset=allows_subset)
            if form.is_in_order
            else _by_key(form, records, tasks)
        )
        for where, record, rows in pairs:
            answer = record[form.answer]
            if not isinstance(answer, str):
                raise RefusedError(
                    f"{where}: {form.answer} must be a string, got {answer!r:.80}. Correct it."
                )
            if not rows:
                unknown.append(where)
            if any(id(row) in found for row in rows):
                repeated.append(where)
            found.update({id(row): (record, answer) for row in rows})
    all_rows = [row for rows in tasks.values() for row in rows if covers(row)]
    missing = [row for row in all_rows if id(row) not in found]
    if unknown or repeated or (missing and not allows_subset):
        _refuse(paths, len(all_rows), len(all_rows) - len(missing), missing, unknown, repeated)
    return [(row, *found[id(row)]) for row in all_rows if id(row) in found]


def _check_ids(tasks: Tasks) -> None:
    places: dict[str, str] = {}
    for rows in tasks.values():
        for row in rows:
            if "id" not in row:
                continue
            if row["id"] in places:
                raise RefusedError(
                    f"{row['where']} must have an id of its own, got {row['id']}, which "
                    f"{places[row['id']]} has too. Take the published file."
                )
            places[row["id"]] = row["where"]


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


def _of_benchmark(
    records: list[tuple[str, Record]], benchmark: Benchmark, path: Path
) -> list[tuple[str, Record]]:
    """Leave out the answers to other benchmarks, which ``realign eval`` stores in the same file."""
    names = {record["benchmark"]: None for _, record in records if "benchmark" in record}
    own = [pair for pair in records if pair[1].get("benchmark", benchmark.name) == benchmark.name]
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
    # of the other formats, some have fields that the stored ones have too
    formats = (STORED_ANSWERS, *benchmark.answer_formats, OWN_ANSWERS, ANSWERS_BY_ID)
    first = records[0][1]
    for form in formats:
        if all(name in first for name in form.fields):
            for where, record in records:
                if lacking := [name for name in form.fields if name not in record]:
                    raise RefusedError(
                        f"{where} requires {' and '.join(lacking)}, as the first record of "
                        f"{path.name} has, got only {sorted(record)}. Add what is missing."
                    )
                _check_fields(record, form, where)
            return form
    known = "; ".join(" and ".join(form.fields) for form in formats)
    raise RefusedError(
        f"{records[0][0]}: an answer of {benchmark.title} must have one of these sets of fields: "
        f"{known}; got {sorted(first)}. docs/evaluation.md describes the formats."
    )


def _check_fields(record: Record, form: AnswerFormat, where: str) -> None:
    """Refuse what no question can be found by; the answer is checked with its question."""
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
