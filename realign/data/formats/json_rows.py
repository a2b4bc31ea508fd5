"""Readers of JSON lines and of JSON lists of any size, one row at a time."""

from __future__ import annotations

import codecs
import json
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TextIO

from realign.data.formats.layout import RefusedRowError
from realign.data.records import COUNTED
from realign.errors import RefusedError
from realign.runtime.strict_json import Flaw, StrictDecoder

CHUNK = 1 << 20
MAX_ROW = 16 << 20  # characters; a conversation has thousands


@dataclass(frozen=True)
class Found:
    """A row at one place of a file, or the reason why it cannot be read.

    Attributes:
        number: Number of the row, from 1.
        where: Place in the file: "line 3", "row 3".
        row: The row; None if it cannot be read.
        problem: The reason, or None.
    """

    number: int
    where: str
    row: Any = None
    problem: RefusedRowError | None = None

    def place(self, file: str) -> str:
        """Return the name of the place in a file, for messages."""
        return f"{file}, {self.where}" + (COUNTED if "row" in self.where else "")


def _problem(flaw: Flaw | None) -> RefusedRowError | None:
    if flaw is None:
        return None
    if flaw.code == "number":
        reason = f"numbers must be finite, got {flaw.value[:60]}. Replace it by null."
        return RefusedRowError("", flaw.code, reason)
    reason = f"key {flaw.value!r:.60} must be given once. Remove one."
    return RefusedRowError(flaw.value, flaw.code, reason)


def is_json_list(path: Path) -> bool:
    """Return whether a JSON file is one list; otherwise every line is a row."""
    with path.open("rb") as file:
        beginning = file.read(4096)
    return beginning.removeprefix(codecs.BOM_UTF8).lstrip(b" \t\r\n").startswith(b"[")


def read_lines(path: Path) -> Iterator[Found]:
    """Yield the rows of JSON lines; reading goes on after a bad line."""
    decoder = StrictDecoder()
    with path.open("rb") as file:
        number = 0
        empty: list[Found] = []  # empty lines, which are no mistake at the end of a file
        while raw := file.readline(MAX_ROW):
            number += 1
            where = f"line {number}"
            if number > 1 and not raw.strip(b" \t\r\n"):
                empty.append(_line(decoder, raw, number, where))
                continue
            yield from empty
            empty.clear()
            if len(raw) == MAX_ROW and not raw.endswith(b"\n"):
                while (rest := file.readline(MAX_ROW)) and not rest.endswith(b"\n"):
                    pass
                yield Found(number, where, problem=_too_long())
                continue
            if number == 1:
                raw = raw.removeprefix(codecs.BOM_UTF8)
            yield _line(decoder, raw, number, where)


def _line(decoder: StrictDecoder, raw: bytes, number: int, where: str) -> Found:
    try:
        text = raw.decode("utf-8").strip(" \t\r\n")
    except UnicodeDecodeError as error:
        return Found(
            number,
            where,
            problem=RefusedRowError(
                "",
                "utf-8",
                f"the line must be UTF-8, got {raw[error.start : error.start + 8]!r} at byte "
                f"{error.start}. Save the file as UTF-8.",
            ),
        )
    if not text:
        empty = RefusedRowError(
            "", "empty-line", "the line must be JSON, got an empty one. Remove it."
        )
        return Found(number, where, problem=empty)
    try:
        value = decoder.decode_all(text)
    except json.JSONDecodeError as error:
        return Found(
            number,
            where,
            problem=RefusedRowError(
                "",
                "json",
                f"the line must be JSON, got {text[:60]!r} ({error.msg}). Correct it.",
            ),
        )
    return Found(number, where, value, _problem(decoder.flaw))


def read_list(path: Path) -> Iterator[Found]:
    """Yield the rows of one JSON list, which is never in memory as a whole.

    Raises:
        RefusedError: The file is not a JSON list from some place on, so that later rows cannot be
            found.
    """
    with path.open(encoding="utf-8-sig", newline="") as file:
        rows = _ListReader(file, path)
        number = 0
        while rows.has_next(first=number == 0):
            number += 1
            value, problem = rows.decode(number)
            yield Found(number, f"row {number}", value, problem)


class _ListReader:
    """Reader of a list's rows, with a part of the text in memory."""

    def __init__(self, file: TextIO, path: Path) -> None:
        self._file, self._path = file, path
        self._decoder = StrictDecoder()
        self._text, self._at, self._is_whole = "", 0, False
        if self._skip_space() != "[":
            raise self._refusal("must begin with [", 1)
        self._at += 1

    def has_next(self, *, first: bool) -> bool:
        """Return whether another row follows; the text in memory then begins with it."""
        mark = self._skip_space()
        if mark == "]":
            self._at += 1
            if self._skip_space():
                raise self._refusal("must end with its list", 0)
            return False
        if first:
            return True
        if mark != ",":
            raise self._refusal("must have , or ] after a row", 0)
        self._at += 1
        self._skip_space()
        return True

    def decode(self, number: int) -> tuple[Any, RefusedRowError | None]:
        """Return the row that the text in memory begins with, or its problem."""
        while True:
            try:
                value, end = self._decoder.decode(self._text, self._at)
                # a number at the end of the text in memory may continue: 1 may be 1.5 or 1e5
                rest = self._text[end : end + 8]
                if (rest and rest[0] in " \t\r\n,]") or len(rest) == 8 or self._is_whole:
                    self._at = end
                    return value, _problem(self._decoder.flaw)
            except json.JSONDecodeError as error:
                if self._is_whole or len(self._text) - self._at > MAX_ROW:
                    raise self._refusal(f"must be JSON ({error.msg})", number) from None
            self._read(max(CHUNK, len(self._text) - self._at))  # doubling keeps the time linear

    def _skip_space(self) -> str:
        """Return the next character that is not a space, or an empty string at the end."""
        while True:
            while self._at < len(self._text) and self._text[self._at] in " \t\r\n":
                self._at += 1
            if self._at < len(self._text):
                return self._text[self._at]
            if self._is_whole:
                return ""
            self._read(CHUNK)

    def _read(self, size: int) -> None:
        try:
            more = self._file.read(size)
        except UnicodeDecodeError as error:
            raise RefusedError(
                f"{self._path} must be UTF-8 ({error.reason}). Save it as UTF-8."
            ) from None
        self._text = self._text[self._at :] + more
        self._at = 0
        self._is_whole = not more

    def _refusal(self, rule: str, number: int) -> RefusedError:
        place = f", row {number}" if number else ""
        found = self._text[self._at : self._at + 60]
        return RefusedError(
            f"{self._path.name}{place}: the file {rule}, got {found!r}. Correct it; rows after it "
            "cannot be told apart."
        )


def _too_long() -> RefusedRowError:
    return RefusedRowError(
        "", "long-line", f"a row must have at most {MAX_ROW} bytes, got more. Shorten it."
    )
