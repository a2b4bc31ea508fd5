"""SIGTERM while a model trains: remembered, so that the run can save and end; the second one ends
it at once.
"""

from __future__ import annotations

import os
import signal
import threading
import time
from collections.abc import Callable
from types import FrameType, TracebackType
from typing import Any

SIGTERM_EXIT = 143  # 128 + 15, as a shell reports it
# A scheduler that signals every process of a job reaches one that torchrun started twice.
SECONDS_OF_ONE = 2.0


class Preemption:
    """Whether this process was asked to end since the ``with`` block began.

    The handler is set in the main thread of a program only, where Python runs handlers.
    """

    def __init__(self) -> None:
        self.is_requested = False
        self._first = 0.0
        self._previous: Any = None
        self._is_installed = False

    def __enter__(self) -> Preemption:
        self.is_requested = False
        if threading.current_thread() is threading.main_thread():
            self._previous = signal.signal(signal.SIGTERM, self._handle)
            self._is_installed = True
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        if self._is_installed:
            # None: it was not set from Python and cannot be set back
            signal.signal(signal.SIGTERM, self._previous or signal.SIG_DFL)
            self._is_installed = False

    def _handle(self, number: int, frame: FrameType | None) -> None:
        if not self.is_requested:
            self.is_requested, self._first = True, time.monotonic()
        elif time.monotonic() - self._first > SECONDS_OF_ONE:
            os._exit(SIGTERM_EXIT)  # a save in progress is not there until it is whole


def ignore_sigterm(then: Callable[[int], None] | None, worker: int) -> None:
    """``worker_init_fn`` of a DataLoader: a scheduler that signals a whole process group must not
    take the workers away from a process that still has to save. They end with their parent.

    Args:
        then: The function that would have been called.
        worker: The worker's number.
    """
    signal.signal(signal.SIGTERM, signal.SIG_IGN)
    if then is not None:
        then(worker)
