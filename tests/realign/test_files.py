"""Reading text files: every character comes back, and what is malformed is named."""

from __future__ import annotations

from pathlib import Path

import pytest

from realign.errors import RefusedError
from realign.files import read_jsonl, write_jsonl


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
