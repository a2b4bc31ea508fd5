"""Messages of a run on stderr: decisions, and progress as a bar on a terminal or as lines."""

from __future__ import annotations

import sys
import time

from rich.console import Console
from rich.progress import (
    BarColumn,
    MofNCompleteColumn,
    TaskProgressColumn,
    TextColumn,
    TimeRemainingColumn,
)
from rich.progress import Progress as RichProgress

LINE_INTERVAL_SECONDS = 10.0


def announce(line: str) -> None:
    """Print a line on stderr, such as a decision of a run."""
    print(line, file=sys.stderr, flush=True)  # noqa: T201 - this is the program's output


class Progress:
    """Context manager: ``with Progress("cache", total) as progress: progress.advance(n)``."""

    def __init__(self, name: str, total: int, done: int = 0) -> None:
        self._name, self._total, self._done, self._done_before = name, total, done, done
        self._note = ""
        self._started = self._printed = time.monotonic()
        self._last_line: tuple[int, str] | None = None  # its count and note
        self._bar: RichProgress | None = None
        if sys.stderr.isatty():
            columns = (
                TextColumn("{task.description}"),
                BarColumn(),
                TaskProgressColumn(),
                MofNCompleteColumn(),
                TimeRemainingColumn(),
                TextColumn("{task.fields[note]}"),
            )
            self._bar = RichProgress(*columns, console=Console(file=sys.stderr))
            self._bar.add_task(name, total=total, completed=done, note="")

    def __enter__(self) -> Progress:
        if self._bar:
            self._bar.start()
        return self

    def __exit__(self, *error: object) -> None:
        if self._bar:
            self._bar.stop()
        elif error[0] is None and self._last_line != (self._done, self._note):
            self._print_line()

    def advance(self, count: int = 1) -> None:
        """Count ``count`` more items as done."""
        self._done += count
        if self._bar:
            self._bar.advance(self._bar.task_ids[0], count)
        elif time.monotonic() - self._printed > LINE_INTERVAL_SECONDS:
            self._print_line()

    def note(self, text: str) -> None:
        """Set the text after the counts, such as the newest loss."""
        self._note = text
        if self._bar:
            self._bar.update(self._bar.task_ids[0], note=text)

    def _print_line(self) -> None:
        self._printed, self._last_line = time.monotonic(), (self._done, self._note)
        if self._done_before == self._total:
            announce(f"{self._name}: {self._done}/{self._total}, done before")
            return
        seconds = self._printed - self._started
        rate = (self._done - self._done_before) / max(seconds, 1e-9)
        left = (self._total - self._done) / max(rate, 1e-9)
        line = f"{self._name}: {self._done}/{self._total}, {rate:.1f}/s, {seconds:.0f} s"
        line += f", {left:.0f} s left" if self._done < self._total else ""
        announce(line + (f"; {self._note}" if self._note else ""))
