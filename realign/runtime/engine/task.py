"""The protocol of a task that an engine runs, and the errors of its workers."""

from __future__ import annotations

import traceback
from collections.abc import Callable
from contextlib import AbstractContextManager
from typing import Any, Protocol

from realign.errors import RefusedError

# how every message about a worker that is gone ends
REMEDY = (
    "If it was SIGKILL, memory ran out: use fewer workers or smaller batches. Finished shards are "
    "kept; run the same command again."
)
# what a shard's file will hold; engines carry it and know nothing of it
Work = Callable[[Any], bytes]


class WorkerError(RuntimeError):
    """A worker died without an error: it was killed, or out of memory."""


def portable_error(error: Exception) -> Exception:
    """Return the error that the caller raises; others may not survive pickling."""
    if isinstance(error, RefusedError):
        return error
    lines = "".join(traceback.format_exception(error))
    return RuntimeError(f"A worker failed:\n{lines}")


class Task(Protocol):
    """Picklable description of the work."""

    def open(self) -> AbstractContextManager[Work]:
        """Load the resources of the work, such as a model, and release them at the end. It is
        called once in each worker.
        """
        ...
