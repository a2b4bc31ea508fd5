"""Processes that this script starts, each the leader of a group that is ended as a whole.

Tools and launchers start processes of their own. If only the first one were ended, the others would
go on computing on the GPU and disturb later measurements.
"""

from __future__ import annotations

import os
import signal
import subprocess
import tempfile
from collections.abc import Sequence
from contextlib import suppress
from pathlib import Path
from typing import Any, NamedTuple

ROOT = Path(__file__).parents[2]


class Ended(NamedTuple):
    """The output and exit code of a command that has ended."""

    output: str
    code: int | None  # None if it had not ended in time


def run_command(command: Sequence[str], seconds: float, settings: dict[str, str]) -> Ended:
    """Run a command at the root of the repository.

    Args:
        command: Program and arguments.
        seconds: Time after which it is ended, with everything that it has started.
        settings: Environment variables in addition to those of this process.
    """
    with tempfile.TemporaryFile(mode="w+", encoding="utf-8", errors="replace") as output:
        process = subprocess.Popen(
            command,
            cwd=ROOT,
            stdout=output,
            stderr=subprocess.STDOUT,
            env={**os.environ, **settings},
            start_new_session=True,
        )
        is_whole = has_ended(process, seconds)
        output.seek(0)
        return Ended(output.read(), process.returncode if is_whole else None)


def has_ended(process: subprocess.Popen[Any], seconds: float) -> bool:
    """Wait for a process that leads a session, end its group; return whether it ended in time."""
    try:
        process.wait(timeout=max(1.0, seconds))
    except subprocess.TimeoutExpired:
        return False
    finally:  # also where the wait was interrupted
        with suppress(ProcessLookupError):  # all of them have ended
            os.killpg(process.pid, signal.SIGKILL)
        process.wait()
    return True
