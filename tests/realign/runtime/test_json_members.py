"""Reading a large JSON object an entry at a time gives the same as reading it as a whole."""

from __future__ import annotations

import json
import tracemalloc
from pathlib import Path
from typing import Any

import pytest

from realign.errors import RefusedError
from realign.runtime import strict_json
from realign.runtime.strict_json import iter_members

CONTENT: dict[str, Any] = {
    "info": {"year": 2014, "numbers": [1, -2.5e3, 123456789]},
    "annotations": [{"id": 1, "text": "a\n\u00e9\u2028 \U0001f600"}, 12345, [], "x", None, True],
    "empty": [],
    "last": [{"a": [[1.5, 2], {}]}],
}
LISTS = ["annotations", "empty", "last"]


@pytest.mark.parametrize("part", [1, 2, 3, 7, 64, 1 << 22])
@pytest.mark.parametrize("indent", [None, 1])
def test_members_are_read_for_any_part_size(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, part: int, indent: int | None
) -> None:
    monkeypatch.setattr(strict_json, "_PART_BYTES", part)
    path = tmp_path / "a.json"
    for ascii_only in (True, False):
        text = json.dumps(CONTENT, indent=indent, ensure_ascii=ascii_only)
        path.write_text(f"\ufeff{text}\n", encoding="utf-8")
        assert [*iter_members(path, LISTS)] == [(k, v) for k in LISTS for v in CONTENT[k]]


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("", "must be a JSON object with '{' here, got ''"),
        ("[1]", r"must be a JSON object with '{' here, got '\[1\]'"),
        ('{"a": [1, 2', "must be a JSON object with ',' here"),
        ('{"a": [1 2]}', "must be a JSON object with ',' here"),
        ('{"a": [1, nul]}', "must be JSON, got"),
        ('{"a": 3}', r"must be a JSON object with '\[' here"),
        ('{"a": []} 3', "must hold one JSON object, got '3' behind it"),
        ('{"b": []}', r"must have the list a, got only \['b'\]"),
        ('{"a": [], "a": []}', "must have every key once"),
        ("{3: []}", "must have every key once, as a string, got 3"),
        ('{"a": [{"b": 1, "b": 2}]}', "must not have a key twice"),
        ('{"a": [NaN]}', "must not have a number that is not finite"),
        ('{"b": 1e999, "a": []}', "must not have a number that is not finite"),
        ('{"a": ["\\ud800"]}', "must have surrogates in pairs"),
        ('{"a": ["\udc80"]}', "must be UTF-8, got byte 0x80"),
    ],
)
def test_malformed_members_are_refused_by_name(tmp_path: Path, text: str, message: str) -> None:
    path = tmp_path / "big.json"
    path.write_bytes(text.encode(errors="surrogateescape"))
    with pytest.raises(RefusedError, match=message) as error:
        [*iter_members(path, ["a"])]
    assert "big.json" in str(error.value)


def test_members_are_read_in_bounded_memory(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(strict_json, "_PART_BYTES", 1 << 12)
    path = tmp_path / "a.json"
    path.write_text(json.dumps({"a": [{"n": i, "text": "x" * 80} for i in range(5000)]}))
    tracemalloc.start()
    assert sum(1 for _ in iter_members(path, ["a"])) == 5000
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert path.stat().st_size > 500_000
    assert peak < 100_000
