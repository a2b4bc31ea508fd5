"""Reading a source of which every row must be good."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from realign.build.corpus import Corpus
from realign.build.sources.strict import read_every_row
from realign.errors import RefusedError

GOOD = {"image": "a.jpg", "prompt": "x", "answer": "y"}


def write(path: Path, *rows: object) -> Path:
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


def test_good_rows_are_returned_in_order(tmp_path: Path, images: Path) -> None:
    path = write(tmp_path / "s.jsonl", GOOD, GOOD | {"image": "b.jpg"}, GOOD)
    rows = read_every_row(path, images)
    assert [row.id for row in rows] == ["0", "1", "2"]
    assert Corpus.of(rows).names == ["a.jpg", "b.jpg"]


def test_all_bad_rows_are_named(tmp_path: Path, images: Path) -> None:
    bad = [GOOD | {"prompt": ""}, GOOD | {"answer": "y</s>"}, GOOD | {"answer": None}]
    path = write(tmp_path / "s.jsonl", GOOD, *bad)
    with pytest.raises(RefusedError) as refused:
        read_every_row(path, images, ["</s>"])
    first, *lines = str(refused.value).splitlines()
    assert first == "3 problem(s) in 4 rows:"
    assert lines[0].startswith("s.jsonl, line 2: prompt must be a non-empty string, got ''. Fill")
    assert lines[1].startswith("s.jsonl, line 3: answer must not contain the special token '</s>'")
    assert lines[2] == "s.jsonl, row 3: answer must not be empty. Fill it in or remove the row."


def test_an_unreadable_image_is_named(tmp_path: Path, images: Path) -> None:
    (images / "b.jpg").write_text("no image")
    path = write(tmp_path / "s.jsonl", GOOD, GOOD | {"image": "b.jpg"})
    with pytest.raises(RefusedError, match=r"s\.jsonl, b\.jpg: image must be a readable"):
        read_every_row(path, images)
