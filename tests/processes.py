"""Processes that tests have started: whether one still runs, and waiting for them."""

from __future__ import annotations

import time
from collections.abc import Callable
from pathlib import Path


def is_running(pid: int) -> bool:
    """Return whether a process runs; one that has ended and is not yet waited for does not."""
    try:
        state = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0]
    except (FileNotFoundError, ProcessLookupError):  # the latter if it ends before it is read
        return False
    return state not in ("Z", "X")


def wait_until(is_so: Callable[[], bool], seconds: float = 300) -> None:
    """Wait for a condition, and fail where it does not come true in time."""
    end = time.monotonic() + seconds
    while not is_so():
        assert time.monotonic() < end, f"the condition did not come true in {seconds} s"
        time.sleep(0.05)
