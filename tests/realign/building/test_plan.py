"""Durations as a plan writes them."""

from __future__ import annotations

import pytest

from realign.building.plan import duration


@pytest.mark.parametrize(
    ("seconds", "text"),
    [
        (0.01, "1 s"),
        (59.4, "59 s"),
        (60, "1 min"),
        (3599, "1 h"),
        (3600 + 23 * 60, "1 h 23 min"),
        (24 * 3600, "1 d"),
        (26 * 3600 + 59 * 60, "1 d 2 h"),
    ],
)
def test_a_duration_is_written_in_its_two_largest_units(seconds: float, text: str) -> None:
    assert duration(seconds) == text
