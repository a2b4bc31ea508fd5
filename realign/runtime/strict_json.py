"""Strict JSON of files that others wrote, since what is guessed here is trained on."""

from __future__ import annotations

import json
import math
import re
from collections import Counter
from collections.abc import Iterator
from pathlib import Path
from typing import Any, BinaryIO, NamedTuple

from realign.errors import RefusedError
from realign.runtime.files import canonical_json, read_utf8

MAX_LINE_BYTES = 1 << 20
# half of a pair cannot be tokenized or written
_SURROGATE = re.compile(r"\\u[dD][89a-fA-F]")


class Flaw(NamedTuple):
    """What Python's decoder accepts and this project does not.

    Attributes:
        code: ``duplicate-key`` or ``number``.
        value: The key that one object has twice, or the number that is not finite.
    """

    code: str
    value: str


class StrictDecoder:
    """JSON decoder that notices objects with a key twice and numbers that are not finite, and goes
    on, so that the end of a flawed value is known too.

    Attributes:
        flaw: The first flaw of the text that was decoded last.
    """

    def __init__(self) -> None:
        self.flaw: Flaw | None = None
        self._decoder = json.JSONDecoder(
            object_pairs_hook=self._object, parse_float=self._number, parse_constant=self._number
        )

    def decode(self, text: str, start: int = 0) -> tuple[Any, int]:
        """Return the value that begins at ``start``, and where it ends.

        Raises:
            json.JSONDecodeError: There is no whole value.
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
    """Read a JSON lines file a line at a time, and go on after a bad line.

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
    """Read to the end of the line; return how many bytes that was."""
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
        RefusedError: It is not UTF-8 or not JSON, or has a key twice in an object, or a number
            that is not finite.
    """
    return _parse(read_utf8(path).removeprefix("\ufeff"), str(path), has_lines=True)


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
