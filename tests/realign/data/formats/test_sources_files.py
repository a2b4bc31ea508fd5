"""Rows are read from lines, one list or tables, and some files are refused as a whole."""

from __future__ import annotations

import dataclasses
import json
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from realign.data.formats import json_rows
from realign.data.formats.json_rows import read_lines, read_list
from realign.data.formats.read_source import read_source
from realign.errors import RefusedError

GOOD = b'{"image": "a.jpg", "prompt": "x", "answer": "y"}'


def test_a_bad_line_does_not_stop_reading_later_lines(tmp_path: Path, images: Path) -> None:
    bad = {
        b"{": "json",
        b"": "empty-line",
        GOOD + b" {}": "json",
        b'{"image": "\xff"}': "utf-8",
        b'{"a": 1, "b": {"c": 1, "c": 2}}': "duplicate-key",
        b'{"a": [NaN]}': "number",
        b'{"a": -Infinity}': "number",
        b'{"a": 1e999}': "number",
        b'{"a": ' + b"1" * 5000 + b"}": "json",
        b"[" * 200_000: "json",
        b"[]": "not-an-object",
        b"null": "not-an-object",
    }
    lines = [GOOD, *bad, GOOD.replace(b'"y"', '"\u2028ü"'.encode()) + b"\r"]
    (tmp_path / "s.jsonl").write_bytes(b"\xef\xbb\xbf" + b"\n".join(lines))
    source = read_source(tmp_path / "s.jsonl", images)
    assert [row.answer for row in source.rows] == ["y", "\u2028ü".strip()]
    assert [problem.code for problem in source.problems] == list(bad.values())
    assert [p.place for p in source.problems] == [f"s.jsonl, line {i}" for i in range(2, 14)]
    assert [row.source["index"] for row in source.rows] == [0, 13]
    assert "at byte 11. Save the file as UTF-8." in source.problems[3].message


def test_an_overlong_line_is_refused_in_bounded_memory(tmp_path: Path, monkeypatch) -> None:
    monkeypatch.setattr(json_rows, "MAX_ROW", 1000)
    long = b'{"a": "' + b"x" * 5000 + b'"}'
    (tmp_path / "s.jsonl").write_bytes(b"\n".join([GOOD, long, GOOD, long]))
    found = list(read_lines(tmp_path / "s.jsonl"))
    codes = [item.problem and item.problem.code for item in found]
    assert codes == [None, "long-line", None, "long-line"]
    assert [item.where for item in found] == ["line 1", "line 2", "line 3", "line 4"]


SCALAR = st.none() | st.booleans() | st.integers() | st.text(max_size=20)
JSON = st.recursive(
    SCALAR | st.floats(allow_nan=False, allow_infinity=False),
    lambda value: st.lists(value, max_size=3) | st.dictionaries(st.text(max_size=4), value),
    max_leaves=8,
)


@settings(max_examples=150, deadline=None)
@given(rows=st.lists(JSON, max_size=8), chunk=st.integers(1, 40), indent=st.sampled_from([None, 2]))
def test_rows_of_a_list_equal_those_of_the_json_module(
    tmp_path_factory, rows: list[Any], chunk: int, indent: int | None
) -> None:
    path = tmp_path_factory.getbasetemp() / "list.json"
    path.write_text(json.dumps(rows, indent=indent, ensure_ascii=chunk % 2 == 0), encoding="utf-8")
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(json_rows, "CHUNK", chunk)
        found = list(read_list(path))
    assert [item.row for item in found] == json.loads(path.read_text(encoding="utf-8"))
    assert [item.number for item in found] == list(range(1, len(rows) + 1))
    assert not any(item.problem for item in found)


@pytest.mark.parametrize("chunk", [1, 7, 1 << 20])
@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("[1, 2", "the file must have , or ] after a row, got ''"),
        ("[1 2]", "the file must have , or ] after a row, got '2"),
        ("[1, ]", r"row 2: the file must be JSON \(Expecting value\), got '\]'"),
        ('[1, {"a": }]', r"row 2: the file must be JSON \(Expecting value\)"),
        ("[1] 2", "the file must end with its list, got '2'"),
        ("[", r"row 1: the file must be JSON"),
        ("[" * 100_000, "row 1: the file must be JSON"),
        ('["\xe4', "must be UTF-8"),
    ],
)
def test_a_file_that_does_not_hold_a_list_is_refused(
    tmp_path: Path, monkeypatch, text: str, message: str, chunk: int
) -> None:
    monkeypatch.setattr(json_rows, "CHUNK", chunk)
    (tmp_path / "s.json").write_bytes(text.encode("latin-1"))
    with pytest.raises(RefusedError, match=message):
        list(read_list(tmp_path / "s.json"))


def test_a_bad_row_of_a_list_does_not_stop_reading_later_rows(tmp_path: Path, images: Path) -> None:
    rows = [GOOD, b'{"image": "a.jpg", "image": "b.jpg"}', b'{"x": NaN}', b"7", GOOD]
    (tmp_path / "s.json").write_bytes(b"\xef\xbb\xbf [" + b",\n".join(rows) + b"]\n")
    source = read_source(tmp_path / "s.json", images)
    assert len(source.rows) == 2
    assert [p.code for p in source.problems] == ["duplicate-key", "number", "not-an-object"]


def test_an_overlong_row_of_a_list_is_refused(tmp_path: Path, monkeypatch) -> None:
    monkeypatch.setattr(json_rows, "CHUNK", 100)
    monkeypatch.setattr(json_rows, "MAX_ROW", 1000)
    (tmp_path / "s.json").write_text('["' + "x" * 100_000)
    with pytest.raises(RefusedError, match=r"row 1: the file must be JSON .* rows after it cannot"):
        list(read_list(tmp_path / "s.json"))


def test_missing_and_empty_files_are_refused(tmp_path: Path, images: Path) -> None:
    with pytest.raises(RefusedError, match=r"got .*none\.json, which does not exist\. Check"):
        read_source(tmp_path / "none.json", images)
    for text in ("", "[]", " \n [ ]"):
        (tmp_path / "s").write_text(text)
        with pytest.raises(RefusedError, match="at least one row, got none in"):
            read_source(tmp_path / "s", images)
    with pytest.raises(RefusedError, match=r"images must be an existing folder, got .*nodir"):
        read_source(tmp_path / "s", tmp_path / "nodir")
    (tmp_path / "s").write_bytes(GOOD)
    with pytest.raises(RefusedError, match=r"source's images such as 'a\.jpg'\. Pass --images"):
        read_source(tmp_path / "s", None)


@settings(max_examples=300, deadline=None)
@given(data=st.data())
def test_damaged_files_give_problems_or_refusals_and_no_other_error(
    tmp_path_factory, data: Any
) -> None:
    """Truncated, overwritten or doubled bytes are read, reported or refused."""
    folder = tmp_path_factory.getbasetemp()
    (folder / "a.jpg").write_bytes(b"")
    row = '{"id": "1", "image": "a.jpg", "conversations": [{"from": "human", "value": "<image>Q"}]}'
    text = data.draw(st.sampled_from([f"[{row},\n{row}]", f"{row}\n{row}\n"])).encode()
    start = data.draw(st.integers(0, len(text)))
    stop = data.draw(st.integers(start, min(len(text), start + 12)))
    middle = data.draw(
        st.binary(max_size=4) | st.sampled_from([b"NaN", b"\\ud800", b"[{", b"1e999"])
    )
    (folder / "damaged").write_bytes(text[:start] + middle + text[stop:])
    try:
        source = read_source(folder / "damaged", folder)
    except RefusedError:
        return
    assert len(source.rows) + len(source.problems) == source.num_read
    for problem in source.problems:
        "".join(dataclasses.astuple(problem)).encode()
    for row in source.rows:
        json.dumps(row.source, allow_nan=False, ensure_ascii=False).encode()
        assert row.instruction.encode()


def test_empty_lines_at_the_end_are_accepted(tmp_path: Path, images: Path) -> None:
    row = json.dumps({"image": "a.jpg", "prompt": "x", "answer": "y"})
    path = tmp_path / "rows.jsonl"
    path.write_text(f"{row}\n\n{row}\n\n \n")
    source = read_source(path, images)
    assert len(source.rows) == 2
    assert [(problem.place, problem.code) for problem in source.problems] == [
        ("rows.jsonl, line 2", "empty-line")
    ]
