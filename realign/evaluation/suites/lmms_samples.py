"""Answers that lmms-eval stored, joined to their questions."""

from __future__ import annotations

import json
from collections.abc import Hashable, Mapping, Sequence
from pathlib import Path
from typing import Any

from realign.errors import RefusedError
from realign.evaluation.rows import Row
from realign.evaluation.suites.lmms_tasks import LmmsTask
from realign.runtime.files import finite_or_null, read_utf8
from realign.runtime.strict_json import StrictDecoder


def read_samples(path: Path) -> list[tuple[str, dict[str, Any]]]:
    """Read the lines of a file of answers, each with its place as messages name it.

    Raises:
        RefusedError: A line is not JSON, or lacks the prompt or the answer.
    """
    records = []
    for number, line in enumerate(read_utf8(path).removesuffix("\n").split("\n"), start=1):
        where = f"{path.name}, line {number}"
        try:
            record = finite_or_null(StrictDecoder().decode_all(line))
        except json.JSONDecodeError as error:
            raise RefusedError(
                f"{where} must be JSON, got {line[:60]!r} ({error.msg}). Run lmms-eval again."
            ) from None
        if not isinstance(record, dict) or not isinstance(record.get("input"), str):
            raise RefusedError(
                f"{where} must be an object with the prompt as input, got {record!r:.60}. Give the "
                "file that lmms-eval wrote."
            )
        if not isinstance(record.get("filtered_resps"), str):
            raise RefusedError(
                f"{where} must hold one answer as filtered_resps, got "
                f"{record.get('filtered_resps')!r:.60}. Run lmms-eval without repeats."
            )
        records.append((where, record))
    return records


def join(
    samples: Sequence[tuple[str, dict[str, Any]]],
    task: LmmsTask,
    rows_of: Mapping[str, Sequence[Row]],
    path: Path,
    *,
    allow_subset: bool,
) -> list[tuple[Row, str, bool]]:
    """Find the question of every answer.

    The question is found by the id that a metric holds, or else by its number and its text in the
    prompt. The hash that lmms-eval stores is the same for all questions, so it is not used.

    Returns:
        Row, answer, and whether generation seems to have failed.
    Raises:
        RefusedError: An answer belongs to no question of the data or to an already answered one, a
            prompt does not hold its question, or questions have no answer.
    """
    rows = task.rows(rows_of)
    named: dict[Hashable, list[Row]] = {}
    for row in rows:
        for key in dict.fromkeys(task.row_keys(row)):
            named.setdefault(key, []).append(row)
    found: dict[int, tuple[Row, str, bool]] = {}
    for where, record in samples:
        row = _row(where, record, task, rows, named)
        if _plain(task.question(row)) not in _plain(record["input"]):
            raise RefusedError(
                f"{where}: the prompt must hold the question {task.question(row)!r:.80} of "
                f"{row['where']}, got {record['input']!r:.80}. Give the --data that was "
                "asked about."
            )
        if id(row) in found:
            raise RefusedError(
                f"{where} must answer another question than the lines before it, got "
                f"{row['where']} again. Two runs may have the same "
                "time stamp; remove the file and run one again."
            )
        counts = record.get("token_counts")
        has_failed = not record["filtered_resps"] and counts in (None, [None])
        found[id(row)] = (row, record["filtered_resps"], has_failed)
    missing = [row for row in rows if id(row) not in found]
    if missing and not allow_subset:
        raise RefusedError(
            f"{path} must answer each of the {len(rows):,} questions of {task.name}, got "
            f"{len(found):,}, none to {missing[0]['where']}. Give the --data that was asked about, "
            "or pass --allow-subset to score a part."
        )
    return [found[id(row)] for row in rows if id(row) in found]


def _row(
    where: str,
    record: Mapping[str, Any],
    task: LmmsTask,
    rows: Sequence[Row],
    named: Mapping[Hashable, Sequence[Row]],
) -> Row:
    key = task.sample_key(record)
    if key is not None and len(named.get(key, ())) == 1:
        return named[key][0]
    number = record.get("doc_id")
    if (key is not None and not named.get(key)) or type(number) is not int:
        raise RefusedError(
            f"{where} must answer a question of {task.name}, got one named {key!r:.60}, which the "
            "data does not have. Give the --data that was asked about."
        )
    if not 0 <= number < len(rows):
        raise RefusedError(
            f"{where}: doc_id must be below {len(rows):,}, the questions of {task.name}, got "
            f"{number}. Give the --data that was asked about."
        )
    return rows[number]


def _plain(text: str) -> str:
    # some tasks capitalize a question or take white space from its end
    return " ".join(text.lower().split())
