"""Progress as the lines of a log file."""

from __future__ import annotations

import pytest

from realign.runtime import progress
from realign.runtime.progress import Progress


def lines(capsys: pytest.CaptureFixture[str]) -> list[str]:
    return capsys.readouterr().err.splitlines()


def test_the_last_line_is_printed_once(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(progress, "LINE_INTERVAL_SECONDS", -1.0)  # a line an item
    with Progress("work", 3) as bar:
        for _ in range(3):
            bar.advance()
    assert [line.partition(",")[0] for line in lines(capsys)] == [
        "work: 1/3",
        "work: 2/3",
        "work: 3/3",
    ]


def test_a_note_follows_the_counts(capsys: pytest.CaptureFixture[str], monkeypatch) -> None:
    monkeypatch.setattr(progress, "LINE_INTERVAL_SECONDS", -1.0)
    with Progress("train", 2) as bar:
        bar.advance()
        bar.note("loss 0.693")
        bar.advance()
    first, last = lines(capsys)
    assert ";" not in first
    assert last.startswith("train: 2/2, ")
    assert last.endswith(" s; loss 0.693")


def test_work_done_before_has_no_rate(capsys: pytest.CaptureFixture[str]) -> None:
    with Progress("work", 3, done=3):
        pass
    assert lines(capsys) == ["work: 3/3, done before"]


def test_a_failed_run_prints_no_last_line(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(KeyboardInterrupt), Progress("work", 3):
        raise KeyboardInterrupt
    assert lines(capsys) == []


def test_a_note_after_the_last_count_is_printed(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    """A loss arrives after its step has been counted."""
    monkeypatch.setattr(progress, "LINE_INTERVAL_SECONDS", -1)  # every count has a line
    with Progress("train", 1) as running:
        running.advance()
        running.note("loss 1.25")
    first, last = capsys.readouterr().err.splitlines()
    assert first.startswith("train: 1/1")
    assert last.endswith("; loss 1.25")
