"""Sampling: rows drawn by seed and id, in the order of the source, each as likely as any other."""

from __future__ import annotations

from collections import Counter
from pathlib import Path

import pytest

from realign.building.source import sample_rows
from realign.data.formats.source_row import SourceRow
from realign.errors import RefusedError

ROWS = [SourceRow(f"row-{i}", "a.png", Path("a.png"), ({"role": "user"},)) for i in range(50)]


def draw(size: int, seed: int, rows: list[SourceRow] = ROWS) -> list[str]:
    return [row.id for row in sample_rows(rows, size, seed, "rows.json")]


def test_a_sample_depends_on_the_seed_and_keeps_the_source_order() -> None:
    drawn = draw(20, 3)
    assert len(drawn) == 20
    assert drawn == sorted(drawn, key=lambda name: int(name.removeprefix("row-")))
    assert drawn == draw(20, 3) != draw(20, 4)
    assert draw(50, 3) == [row.id for row in ROWS]


def test_a_larger_sample_contains_a_smaller_one_and_ignores_row_order() -> None:
    assert {*draw(10, 0)} < {*draw(20, 0)}
    drawn = draw(20, 0)
    left = [row for row in ROWS if row.id != drawn[0]]
    assert {*drawn[1:]} < {*draw(20, 0, left)}
    assert {*draw(20, 0, ROWS[::-1])} == {*drawn}


def test_every_row_is_as_likely_as_any_other() -> None:
    """A row comes 200 times in 1,000 draws of 10 of 50, with a standard deviation of 12.6."""
    counts = Counter(name for seed in range(1000) for name in draw(10, seed))
    assert len(counts) == 50
    assert all(140 < count < 260 for count in counts.values())


def test_a_sample_larger_than_the_source_is_refused() -> None:
    with pytest.raises(
        RefusedError, match=r"sample must be at most the 50 good rows of rows\.json, got 51\. Lower"
    ):
        draw(51, 0)
