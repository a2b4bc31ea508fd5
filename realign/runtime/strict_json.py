"""Strict decoding of JSON files of other programs, since a wrong guess would be trained on."""

from __future__ import annotations

import codecs
import json
import math
import re
from collections import Counter
from collections.abc import Collection, Iterator
from pathlib import Path
from typing import Any, BinaryIO, NamedTuple, NoReturn

from realign.errors import RefusedError
from realign.runtime.files import canonical_json, read_utf8

MAX_LINE_BYTES = 1 << 20
_PART_BYTES = 1 << 22
# an unpaired surrogate cannot be tokenized or written
_SURROGATE = re.compile(r"\\u[dD][89a-fA-F]")


class Flaw(NamedTuple):
    """A flaw of JSON that Python's decoder accepts and this project refuses.

    Attributes:
        code: ``duplicate-key`` or ``number``.
        value: Key that an object has twice, or number that is not finite.
    """

    code: str
    value: str


class StrictDecoder:
    """JSON decoder that records repeated keys of an object and numbers that are not finite, but
    continues, so that the end of a flawed value is known.

    Attributes:
        flaw: First flaw of the value that was decoded last; None without a flaw.
    """

    def __init__(self) -> None:
        self.flaw: Flaw | None = None
        self._decoder = json.JSONDecoder(
            object_pairs_hook=self._object, parse_float=self._number, parse_constant=self._number
        )

    def decode(self, text: str, start: int = 0) -> tuple[Any, int]:
        """Return the value that begins at ``start``, and where it ends.

        Raises:
            json.JSONDecodeError: There is no complete value.
        """
        self.flaw = None
        try:
            return self._decoder.raw_decode(text, start)
        except json.JSONDecodeError:
            raise
        except (ValueError, RecursionError) as error:  # too many digits, too many brackets
            raise json.JSONDecodeError(str(error), text, start) from None

    def decode_all(self, text: str) -> Any:
        """Return the only value of a text.

        Raises:
            json.JSONDecodeError: The text is not one value.
        """
        spaces = " \t\r\n"
        value, end = self.decode(text, len(text) - len(text.lstrip(spaces)))
        if text[end:].strip(spaces):
            raise json.JSONDecodeError("Extra data", text, end)
        return value

    def _object(self, pairs: list[tuple[str, Any]]) -> dict[str, Any]:
        value = dict(pairs)
        if len(value) < len(pairs):
            again = Counter(key for key, _ in pairs).most_common(1)[0][0]
            self.flaw = self.flaw or Flaw("duplicate-key", again)
        return value

    def _number(self, number: str) -> float:
        if not math.isfinite(value := float(number)):
            self.flaw = self.flaw or Flaw("number", number)
        return value


def iter_jsonl(path: Path) -> Iterator[tuple[int, Any | RefusedError]]:
    """Read a JSON lines file line by line, and continue after a bad line.

    A line must be UTF-8 (the first one with or without a byte order mark) of at most
    ``MAX_LINE_BYTES`` and hold one value, with no key twice in an object, no NaN or Infinity, and
    no half of a surrogate pair.

    Yields:
        The line's number, from 1, and its value, or the refusal that names file and line. Codes:
        ``long-line``, ``utf-8``, ``empty-line``, ``json``, ``duplicate-key``, ``number``,
        ``surrogate``.
    """
    with path.open("rb") as file:
        number = 0
        while raw := file.readline(MAX_LINE_BYTES + 2):  # with its line end, as on Windows
            number += 1
            line = raw.removesuffix(b"\n").removesuffix(b"\r")
            where = f"{path.name}, line {number}"
            try:
                if len(line) > MAX_LINE_BYTES:
                    length = len(raw) + (0 if raw.endswith(b"\n") else _skip_line(file))
                    raise RefusedError(
                        f"{where}: a line must have at most {MAX_LINE_BYTES} bytes, got {length}. "
                        "Shorten it; images are named, not embedded.",
                        code="long-line",
                    )
                yield number, _parse_line(line, where, is_first=number == 1)
            except RefusedError as error:
                yield number, error


def _skip_line(file: BinaryIO) -> int:
    """Read to the end of the line; return the number of bytes."""
    skipped = 0
    while part := file.readline(MAX_LINE_BYTES):
        skipped += len(part)
        if part.endswith(b"\n"):
            break
    return skipped


def _parse_line(line: bytes, where: str, *, is_first: bool) -> Any:
    try:
        text = line.decode("utf-8-sig" if is_first else "utf-8")
    except UnicodeDecodeError as error:
        found = f"byte {line[error.start]:#04x} at position {error.start + 1} of the line"
        if is_first and line.startswith((b"\xff\xfe", b"\xfe\xff")):
            found = "the byte order mark of UTF-16"
        raise RefusedError(
            f"{where} must be UTF-8, got {found}. Save the file as UTF-8.", code="utf-8"
        ) from None
    if not text.strip():
        raise RefusedError(
            f"{where} must be JSON, got an empty line. Remove it.", code="empty-line"
        )
    return _parse(text, where)


def read_json(path: Path) -> Any:
    """Read a JSON file, as strictly as :func:`iter_jsonl` reads a line.

    Raises:
        RefusedError: The file is not UTF-8 or not JSON, or has a key twice in an object, or a
            number that is not finite.
    """
    return _parse(read_utf8(path).removeprefix("\ufeff"), str(path), has_lines=True)


def iter_members(path: Path, lists: Collection[str]) -> Iterator[tuple[str, Any]]:
    """Read a file with one JSON object that is too large for memory, one entry at a time.

    Args:
        path: The file; it is read as strictly as by :func:`read_json`.
        lists: Keys of lists whose entries are yielded. All other values are read and dropped.
    Yields:
        The key of a list and its next entry, in the order of the file.
    Raises:
        RefusedError: For the reasons of :func:`read_json`, or the file does not hold an object, or
            a key of ``lists`` is missing or its value is not a list.
    """
    with path.open("rb") as file:
        reader = _JsonReader(file, str(path))
        reader.take("{")
        seen: set[str] = set()
        while not reader.takes("}"):
            if seen:
                reader.take(",")
            key = reader.value()
            if not isinstance(key, str) or key in seen:
                reader.refuse("have every key once, as a string", repr(key)[:60])
            seen.add(key)
            reader.take(":")
            if key not in lists:
                reader.value()
                continue
            reader.take("[")
            is_first = True
            while not reader.takes("]"):
                if not is_first:
                    reader.take(",")
                is_first = False
                yield key, reader.value()
        reader.end()
        if missing := [key for key in lists if key not in seen]:
            reader.refuse(f"have the list {missing[0]}", f"only {sorted(seen)}")


class _JsonReader:
    """Reader of values and punctuation from a file, with only a part of it in memory."""

    def __init__(self, file: BinaryIO, name: str) -> None:
        self._file, self._name = file, name
        self._bytes = codecs.getincrementaldecoder("utf-8-sig")()
        self._decoder = StrictDecoder()
        self._text, self._position, self._is_whole = "", 0, False

    def value(self) -> Any:
        """Return the value at the current position, and move past it."""
        self._skip_spaces()
        while True:
            try:
                value, end = self._decoder.decode(self._text, self._position)
            except json.JSONDecodeError as error:
                if self._is_whole:
                    self.refuse("be JSON", repr(self._text[max(0, error.pos - 20) :][:40]))
            else:
                # a number may continue in the next part
                if end < len(self._text) or self._is_whole:
                    break
            self._read_on()
        _check_flaw(self._decoder.flaw, self._name)
        if _SURROGATE.search(self._text, self._position, end):
            _check_surrogates(value, self._name)
        self._position = end
        return value

    def takes(self, mark: str) -> bool:
        """Return whether a mark follows, and move behind it if so."""
        self._skip_spaces()
        follows = self._text.startswith(mark, self._position)
        self._position += follows
        return follows

    def take(self, mark: str) -> None:
        """Move behind a mark, which must follow."""
        if not self.takes(mark):
            found = self._text[self._position :][:40]
            self.refuse(f"be a JSON object with {mark!r} here", repr(found))

    def end(self) -> None:
        """Refuse text behind the object."""
        self._skip_spaces()
        if self._position < len(self._text):
            self.refuse("hold one JSON object", f"{self._text[self._position :][:40]!r} behind it")

    def refuse(self, rule: str, found: str) -> NoReturn:
        raise RefusedError(f"{self._name} must {rule}, got {found}. Correct it.", code="json")

    def _skip_spaces(self) -> None:
        while True:
            while self._text[self._position : self._position + 1] in (" ", "\t", "\r", "\n"):
                self._position += 1
            if self._position < len(self._text) or self._is_whole:
                return
            self._read_on()

    def _read_on(self) -> None:
        rest = self._text[self._position :]
        # twice as much for a value that is longer than what is held
        part = self._file.read(max(_PART_BYTES, 2 * len(rest)))
        self._is_whole = not part
        try:
            self._text = rest + self._bytes.decode(part, final=self._is_whole)
        except UnicodeDecodeError as error:
            raise RefusedError(
                f"{self._name} must be UTF-8, got byte {error.object[error.start]:#04x}. Save the "
                "file as UTF-8.",
                code="utf-8",
            ) from None
        self._position = 0


def _parse(text: str, where: str, *, has_lines: bool = False) -> Any:
    decoder = StrictDecoder()
    try:
        value = decoder.decode_all(text)
    except json.JSONDecodeError as error:
        _check_flaw(decoder.flaw, where)
        place = f"{where}, line {error.lineno}" if has_lines else where
        near = text[max(0, error.pos - 20) : error.pos + 20]
        raise RefusedError(
            f"{place} must be JSON, got {near!r} around column {error.colno} ({error.msg}). "
            "Correct it.",
            code="json",
        ) from None
    _check_flaw(decoder.flaw, where)
    if _SURROGATE.search(text):
        _check_surrogates(value, where)
    return value


def _check_flaw(flaw: Flaw | None, where: str) -> None:
    if flaw:
        found = {
            "duplicate-key": f"a key twice in one object, got {flaw.value[:60]!r} again",
            "number": f"a number that is not finite, got {flaw.value[:60]}",
        }
        raise RefusedError(
            f"{where}: JSON must not have {found[flaw.code]}. Correct it.", code=flaw.code
        )


def _check_surrogates(value: Any, where: str) -> None:
    try:
        canonical_json(value).encode()
    except UnicodeEncodeError as error:
        half = error.object[error.start]
        raise RefusedError(
            f"{where}: text must have surrogates in pairs, got {half!r} alone. Remove it.",
            code="surrogate",
        ) from None
