"""Decisions of a person about the rows of a dataset: one line per decision in a file beside it.

A decision is about a row's id and content together. If the content has changed since, it is not
applied, because the person saw something else. Nothing is removed from the file: undoing a decision
adds a line, after which the previous decision counts again.
"""

from __future__ import annotations

import json
import os
import re
from collections.abc import Mapping, Sequence
from contextlib import AbstractContextManager, suppress
from dataclasses import dataclass
from io import FileIO
from pathlib import Path
from typing import Any, NamedTuple

from realign.data.records import LazyRecords, Record, texts_of
from realign.errors import RefusedError
from realign.runtime.files import json_text, sync
from realign.runtime.lock import locked
from realign.runtime.progress import announce

CHOICES = ("keep", "drop", "flag")
UNDO = "undo"  # in place of a choice: undoes the last decision about the row
FIELDS = ("id", "key", "decision", "note")


class RowKey(NamedTuple):
    """The row that a decision is about: its id, and :attr:`Record.key`, the hash of its content."""

    id: str
    key: str


@dataclass(frozen=True)
class Decision:
    """One line of a decision file.

    Attributes:
        id: The row's id.
        key: The row's content, :attr:`Record.key`.
        decision: ``keep``, ``drop`` (training leaves the row out) or ``flag`` (to be looked at
            again; training uses the row). In the file also ``undo``.
        note: Free text.
    """

    id: str
    key: str
    decision: str
    note: str = ""

    @property
    def row(self) -> RowKey:
        """The row that the decision is about."""
        return RowKey(self.id, self.key)


Decisions = Mapping[RowKey, Decision]


def decisions_path(data: Path) -> Path:
    """Return the decision file of a dataset: ``decisions.jsonl`` in a build folder,
    ``<file name>.decisions.jsonl`` beside any other file.
    """
    if data.is_dir():
        return data / "decisions.jsonl"
    own = "" if data.name == "dataset.parquet" else f"{data.name}."
    return data.with_name(f"{own}decisions.jsonl")


def read_decisions(path: Path) -> dict[RowKey, Decision]:
    """Read a decision file; the last decision about a row that is not undone counts. Without a file
    there are no decisions.

    Raises:
        RefusedError: A line is not a decision; the message names it.
    """
    return {decision.row: decision for decision in read_history(path)}


def read_history(path: Path) -> list[Decision]:
    """Read all decisions that are not undone, in the order in which they were made.

    A last line that a killed program left incomplete is announced and left out: its write was never
    confirmed.

    Raises:
        RefusedError: Another line is not a decision; the message names it.
    """
    if not path.is_file():
        return []
    *lines, tail = path.read_bytes().split(b"\n")
    found = [_parse(raw, f"{path}, line {number}") for number, raw in enumerate(lines, start=1)]
    if tail and _is_cut(tail):
        announce(f"{path}: the last line is incomplete and left out; decide about its row again")
    elif tail:
        found.append(_parse(tail, f"{path}, line {len(lines) + 1}"))
    return _without_undone(found, path)


def _without_undone(lines: Sequence[Decision], path: Path) -> list[Decision]:
    places: dict[RowKey, list[int]] = {}
    for number, line in enumerate(lines):
        own = places.setdefault(line.row, [])
        if line.decision != UNDO:
            own.append(number)
        elif own:
            own.pop()
        else:
            raise RefusedError(
                f"{path}, line {number + 1} must undo a decision about its row, got none before "
                "it. Remove the line."
            )
    return [lines[number] for number in sorted(n for own in places.values() for n in own)]


def append_decision(path: Path, decision: Decision) -> None:
    """Append a decision and return when it is on the disk. Several programs may do so at once.

    Raises:
        RefusedError: :func:`read_decisions` would refuse the decision.
    """
    if decision.decision == UNDO:
        raise RefusedError(
            f"decision must be one of {list(CHOICES)}, got {UNDO!r}. Call undo_decision instead."
        )
    line = _line(decision, path)
    with _locked(path):
        _append(path, line)


def undo_decision(path: Path, decision: Decision) -> bool:
    """Undo the last decision about a row; return when this is on the disk.

    Args:
        path: The decision file.
        decision: The decision to undo. If it is not the last one about its row, because another
            program has added one, nothing is written and the result is False.
    Raises:
        RefusedError: The file is damaged.
    """
    with _locked(path):
        if read_decisions(path).get(decision.row) != decision:
            return False
        _append(path, _line(Decision(decision.id, decision.key, UNDO), path))
        return True


def _locked(path: Path) -> AbstractContextManager[None]:
    path.parent.mkdir(parents=True, exist_ok=True)
    return locked(path.with_name(f".{path.name}.lock"))


def _line(decision: Decision, path: Path) -> bytes:
    fields = {"id": decision.id, "key": decision.key, "decision": decision.decision}
    line = json_text(fields | ({"note": decision.note} if decision.note else {}), ensure_ascii=True)
    _parse(line.encode(), str(path))
    return line.encode() + b"\n"


def _append(path: Path, raw: bytes) -> None:
    with path.open("ab+", buffering=0) as file:
        end = _mend_end(file)
        if file.write(raw) != len(raw):
            file.truncate(end)
            raise OSError(f"{path}: only a part of a line could be written")
        os.fsync(file.fileno())
    if not end:  # the file may be new, so its name must be synced too
        sync(path.parent)


class Applied(NamedTuple):
    """A dataset after its decisions were applied.

    Attributes:
        kept: The rows that are not dropped, in order; they are read on access.
        stale: Decisions that no longer apply, because the row's content has changed and has no
            decision of its own.
    """

    kept: Sequence[Record]
    stale: list[Decision]


def apply_decisions(records: Sequence[Record], decisions: Decisions) -> Applied:
    """Leave the dropped rows out. Images are read only for rows whose id has a decision."""
    rows = decided_rows(records, decisions)
    current: dict[str, set[RowKey]] = {}
    for row in rows.values():
        current.setdefault(row.id, set()).add(row)
    stale = [
        decision
        for row, decision in decisions.items()
        if row.id in current and not current[row.id] & decisions.keys()
    ]
    dropped = {row for row, decision in decisions.items() if decision.decision == "drop"}
    left = [i for i in range(len(records)) if rows.get(i) not in dropped]
    return Applied(records if len(left) == len(records) else KeptRecords(records, left), stale)


def decided_rows(records: Sequence[Record], decisions: Decisions) -> dict[int, RowKey]:
    """Return, by position, the id and content of the rows whose id has a decision. Rows that cannot
    be read are left out.
    """
    ids = {row.id for row in decisions}
    texts = texts_of(records)
    found: dict[int, RowKey] = {}
    for index in range(len(records) if ids else 0):
        # whatever reads the row later reports what is wrong with it
        with suppress(RefusedError):
            if (row_id := texts[index].id) in ids:
                found[index] = RowKey(row_id, records[index].key)
    return found


def positions(records: Sequence[Record]) -> Sequence[int]:
    """Return the position of each row in the dataset's file, from 0, dropped rows included."""
    return records.indices if isinstance(records, KeptRecords) else range(len(records))


class KeptRecords(LazyRecords):
    """Rows of ``records`` at ``indices``, read on access."""

    def __init__(self, records: Sequence[Record], indices: Sequence[int]) -> None:
        self._records, self.indices = records, indices

    def __len__(self) -> int:
        return len(self.indices)

    def _read(self, index: int) -> Record:
        return self._records[self.indices[index]]

    def texts(self) -> Sequence[Record]:
        """Return the same rows without their images."""
        return KeptRecords(texts_of(self._records), self.indices)


def _parse(raw: bytes, where: str) -> Decision:
    try:
        line: Any = json.loads(raw)
    except ValueError:  # UnicodeDecodeError is one
        line = None
    if not isinstance(line, dict):
        raise RefusedError(f"{where} must be a JSON object, got {raw[:60]!r}. Remove the line.")
    if unknown := sorted(line.keys() - {*FIELDS}):
        raise RefusedError(
            f"{where}: fields must be of {list(FIELDS)}, got {unknown}. Remove them."
        )
    for name in FIELDS:
        value = line.get(name, "" if name == "note" else None)
        if not isinstance(value, str):
            raise RefusedError(
                f"{where}: {name} must be a text, got {value!r:.60}. Decide in `realign browse`."
            )
    if line["decision"] not in (*CHOICES, UNDO):
        raise RefusedError(
            f"{where}: decision must be one of {[*CHOICES, UNDO]}, got {line['decision']!r:.60}. "
            "Choose one."
        )
    if not re.fullmatch("[0-9a-f]{64}", line["key"]):
        raise RefusedError(
            f"{where}: key must be the row's SHA-256 (Record.key), got {line['key']!r:.80}. "
            "Decide in `realign browse`."
        )
    return Decision(**line)


def _is_cut(tail: bytes) -> bool:
    try:
        json.loads(tail)
    except ValueError:
        return True
    return False


def _mend_end(file: FileIO) -> int:
    """Cut off an unfinished last line, or end a finished one; return the size."""
    size = file.seek(0, os.SEEK_END)
    start, tail = size, b""
    while start and b"\n" not in tail:
        step = min(start, 4096)
        start -= step
        tail = os.pread(file.fileno(), step, start) + tail
    last = tail.rpartition(b"\n")[2]
    if last and _is_cut(last):
        return file.truncate(size - len(last))
    return size + (file.write(b"\n") if last else 0)
