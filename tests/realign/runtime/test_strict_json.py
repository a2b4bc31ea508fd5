"""Text files are read without the loss of a character, and malformed ones are named."""

from __future__ import annotations

import re
import tracemalloc
from collections import deque
from pathlib import Path

import pytest

from realign.errors import RefusedError
from realign.runtime.files import read_jsonl, write_jsonl
from realign.runtime.strict_json import MAX_LINE_BYTES, iter_jsonl, read_json


def test_any_character_survives_json_lines(tmp_path: Path) -> None:
    rows = [{"text": "a\u2028b\x85c\x0bd\r\n"}, {"text": ""}]
    write_jsonl(tmp_path / "a.jsonl", rows)
    assert read_jsonl(tmp_path / "a.jsonl") == rows
    write_jsonl(tmp_path / "a.jsonl", [])
    assert read_jsonl(tmp_path / "a.jsonl") == []


def test_text_that_is_not_utf8_is_named(tmp_path: Path) -> None:
    (tmp_path / "a.jsonl").write_bytes(b"\xff")
    with pytest.raises(RefusedError, match=r"a\.jsonl must be UTF-8"):
        read_jsonl(tmp_path / "a.jsonl")


def lines(tmp_path: Path, raw: bytes) -> list[tuple[int, object]]:
    """Number and value, or code of the refusal, of each line."""
    path = tmp_path / "a.jsonl"
    path.write_bytes(raw)
    found = []
    for number, value in iter_jsonl(path):
        if isinstance(value, RefusedError):
            assert str(value).startswith(f"a.jsonl, line {number}"), value
            assert re.search(r"[.;] \S.*\.$", str(value)), value
            found.append((number, value.code))
        else:
            found.append((number, value))
    return found


@pytest.mark.parametrize(
    ("line", "code"),
    [
        (b'{"a": 1', "json"),
        (b"{'a': 1}", "json"),
        (b'{"a": 1} {"b": 2}', "json"),
        (b'{"a": "\t"}', "json"),
        (b"", "empty-line"),
        (b"  ", "empty-line"),
        (b'{"a": 1, "a": 1}', "duplicate-key"),
        (b'[{"b": {"a": 1, "a": 2}}]', "duplicate-key"),
        (b'{"a": NaN}', "number"),
        (b'{"a": -Infinity}', "number"),
        (b'{"a": 1e999}', "number"),
        (b'{"a": ' + b"1" * 5000 + b"}", "json"),
        (b"[" * 100_000, "json"),
        (b'{"a":' * 100_000, "json"),
        (b'{"a": "\xff"}', "utf-8"),
        (b'{"a": "\xc0\xaf"}', "utf-8"),
        (b'{"a": "\xed\xa0\x80"}', "utf-8"),
        (b'{"a": "\xef\xbb\xbf', "json"),
        (b'{"a": "\\ud83d"}', "surrogate"),
        (b'{"\\udc00": 1}', "surrogate"),
        (b'"' + b"x" * MAX_LINE_BYTES + b'"', "long-line"),
        (b'"' + b"x" * (3 * MAX_LINE_BYTES) + b'"', "long-line"),
        (b"\xef\xbb\xbf{}", "json"),
    ],
)
def test_a_bad_line_is_reported_and_the_next_is_read(
    tmp_path: Path, line: bytes, code: str
) -> None:
    assert lines(tmp_path, b"1\n" + line + b'\n{"b": 2}\n') == [(1, 1), (2, code), (3, {"b": 2})]
    assert lines(tmp_path, b"1\n" + line + b"\n" + line + b"\r\n") == [(1, 1), (2, code), (3, code)]


@pytest.mark.parametrize(
    ("raw", "values"),
    [
        (b"", []),
        (b'{"a": 1}', [{"a": 1}]),
        (b'{"a": 1}\r\n2\r\n', [{"a": 1}, 2]),
        (b'\xef\xbb\xbf{"a": 1}\n', [{"a": 1}]),
        (b'{"a": "\\ud83d\\ude00\\u00e9"}\n', [{"a": "\U0001f600é"}]),
        ('{"a": "\u2028\x85é\\n"}\n'.encode(), [{"a": "\u2028\x85é\n"}]),
        (b'"' + b"x" * (MAX_LINE_BYTES - 2) + b'"\r\n3', ["x" * (MAX_LINE_BYTES - 2), 3]),
        (b'{"a": {"a": 1}, "b": {"a": 1}}', [{"a": {"a": 1}, "b": {"a": 1}}]),
    ],
)
def test_valid_lines_give_their_values(tmp_path: Path, raw: bytes, values: list) -> None:
    assert lines(tmp_path, raw) == [*enumerate(values, start=1)]


def test_utf_16_is_named(tmp_path: Path) -> None:
    (tmp_path / "a.jsonl").write_bytes('{"a": 1}\n'.encode("utf-16"))
    ((_, error), *_) = iter_jsonl(tmp_path / "a.jsonl")
    assert str(error) == (
        "a.jsonl, line 1 must be UTF-8, got the byte order mark of UTF-16. Save the file as UTF-8."
    )


def test_a_line_that_is_too_long_is_refused_with_its_length(tmp_path: Path) -> None:
    (tmp_path / "a.jsonl").write_bytes(b"x" * 2_500_000 + b"\n1")
    (_, error), last = iter_jsonl(tmp_path / "a.jsonl")
    assert "must have at most 1048576 bytes, got 2500001" in str(error)
    assert last == (2, 1)


def test_lines_are_read_one_at_a_time(tmp_path: Path) -> None:
    """Lines of 200 MB, of which one has 150 MB, are read in less than 8 MB of memory."""
    line = b'{"text": "' + b"x" * 100_000 + b'"}\n'
    with (tmp_path / "a.jsonl").open("wb") as file:
        file.writelines([line] * 500)
        file.write(b"y" * 150_000_000)
    tracemalloc.start()
    try:
        ((number, last),) = deque(iter_jsonl(tmp_path / "a.jsonl"), maxlen=1)
        _, peak = tracemalloc.get_traced_memory()
    finally:
        tracemalloc.stop()
    assert number == 501
    assert isinstance(last, RefusedError)
    assert peak < 8_000_000


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ('{"a": 1,\n"a": 2}', "a key twice in one object, got 'a' again"),
        ('{"a": NaN}', "a number that is not finite, got NaN"),
        ('{"a":\n "\\ud800"}', "surrogates in pairs"),
        ("[" * 100_000, "must be JSON"),
        ('{"a":\n', "line 2 must be JSON"),
    ],
)
def test_a_json_file_is_read_with_the_same_strictness(
    tmp_path: Path, text: str, message: str
) -> None:
    (tmp_path / "a.json").write_text(text)
    with pytest.raises(RefusedError, match=rf"a\.json.*{message}"):
        read_json(tmp_path / "a.json")
    (tmp_path / "a.json").write_text("\ufeff{}", encoding="utf-8")
    assert read_json(tmp_path / "a.json") == {}
