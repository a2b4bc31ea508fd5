"""The protocol of a task that an engine runs, and the errors of its workers."""

from __future__ import annotations

import traceback
from collections.abc import Callable
from contextlib import AbstractContextManager
from typing import Any, Protocol

from realign.errors import RefusedError

# the end of every message about a worker that died
REMEDY = (
    "If it was SIGKILL, memory ran out: use fewer workers or smaller batches. Finished shards are "
    "kept; run the same command again."
)
# maps an item to the content of a shard's file, which engines pass on as bytes
Work = Callable[[Any], bytes]


class WorkerError(RuntimeError):
    """A worker died without an error: it was killed, or out of memory."""


def portable_error(error: Exception) -> Exception:
    """Return a picklable error for the caller to raise: a refusal itself, others as their text."""
    if isinstance(error, RefusedError):
        return error
    lines = "".join(traceback.format_exception(error))
    return RuntimeError(f"A worker failed:\n{lines}")


class Task(Protocol):
    """Picklable description of the work."""

    def open(self) -> AbstractContextManager[Work]:
        """Load the resources of the work, such as a model, and release them at the end. Each worker
        calls this once.
        """
        ...
