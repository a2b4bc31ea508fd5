"""JSON that every reader accepts: numbers are finite, and one function writes them."""

from __future__ import annotations

import ast
import json
import math
from pathlib import Path

import pytest

import realign
from realign.runtime.files import (
    canonical_json,
    finite_or_null,
    json_text,
    read_jsonl,
    write_json,
    write_jsonl,
)

# Between processes, in memory and in messages; no file.
NO_FILES = {
    "generation/endpoint.py",
    "data/formats/official.py",
    "data/image_worker.py",
    "data/image_pool.py",
}


@pytest.mark.parametrize("value", [math.nan, math.inf, -math.inf])
def test_non_finite_numbers_are_not_written(tmp_path: Path, value: float) -> None:
    row = {"a": [{"b": value}]}
    for write in (
        lambda: write_json(tmp_path / "a.json", row),
        lambda: write_jsonl(tmp_path / "a.jsonl", [{"a": 1}, row]),
        lambda: canonical_json(row),
        lambda: json_text(row),
    ):
        with pytest.raises(ValueError, match="Out of range float values are not JSON"):
            write()
    assert [*tmp_path.iterdir()] == []
    assert finite_or_null(row) == {"a": [{"b": None}]}
    write_jsonl(tmp_path / "a.jsonl", [finite_or_null(row)])
    assert read_jsonl(tmp_path / "a.jsonl") == [{"a": [{"b": None}]}]


def test_finite_values_are_written_unchanged() -> None:
    value = {"a": (1, 2.5, True, None, "nan"), 3: []}
    assert finite_or_null(value) == {"a": [1, 2.5, True, None, "nan"], 3: []}
    assert json_text("é") == '"é"'
    assert json_text("é", ensure_ascii=True) == json.dumps("é")


def test_only_one_module_writes_json() -> None:
    root = Path(realign.__file__).parent
    spelling = {
        path.relative_to(root).as_posix()
        for path in root.rglob("*.py")
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8")))
        if isinstance(node, ast.Attribute)
        and node.attr in ("dump", "dumps", "JSONEncoder")
        and isinstance(node.value, ast.Name)
        and node.value.id == "json"
    }
    assert spelling == NO_FILES | {"runtime/files.py"}
