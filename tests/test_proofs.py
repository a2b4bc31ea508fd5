"""Every row of docs/proofs.md names tests that exist, and `make test` runs one of them."""

from __future__ import annotations

import re
from pathlib import Path

import pytest

from tests.conftest import FOUND

PAGE = (Path(__file__).parents[1] / "docs" / "proofs.md").read_text(encoding="utf-8")
ROWS = dict(re.findall(r"^\| ([KRT]\d\d) \| (.*) \|$", PAGE, re.MULTILINE))
# marks of tests that `make test` does not run
LONGER = {"full", "slow", "browser"}


def test_every_row_is_read() -> None:
    counts = {letter: sum(row[0] == letter for row in ROWS) for letter in "KRT"}
    assert counts == {"K": 34, "R": 14, "T": 14}


@pytest.mark.parametrize("row", ROWS)
def test_every_proof_has_a_quick_test(row: str, request: pytest.FixtureRequest) -> None:
    named = re.findall(r"`(?:\w+/)*(test_\w+\.py)::(test_\w+)`", ROWS[row])
    if not named:
        assert "needs a GPU" in ROWS[row]
        return
    found = request.config.stash[FOUND]
    collected = {item.path.name for item in found}
    quick: list[str] = []
    for file, name in named:
        items = [
            item
            for item in found
            if item.path.name == file and getattr(item, "originalname", None) == name
        ]
        # where only a part of the tests was collected, its file may be missing
        assert items or file not in collected, f"{file}::{name} is not there"
        quick += [
            item.nodeid for item in items if not {m.name for m in item.iter_markers()} & LONGER
        ]
    names_longer_run = "`make test-full`" in ROWS[row] or "`make test-slow`" in ROWS[row]
    assert quick or names_longer_run or not {file for file, _ in named} <= collected
