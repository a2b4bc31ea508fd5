"""What an engine runs: a task is opened once a worker and called once a shard."""

from __future__ import annotations

from collections.abc import Callable
from contextlib import AbstractContextManager
from typing import Any, Protocol

# what a shard's file will hold; engines carry it and know nothing of it
Work = Callable[[Any], bytes]


class Task(Protocol):
    """Picklable description of work."""

    def open(self) -> AbstractContextManager[Work]:
        """Load what the work needs, such as a model, and let go of it at the end. Called in the
        worker, once.
        """
        ...
