"""SIGTERM and SIGINT (Ctrl-C) in training: the first saves and ends, a second ends at once."""

from __future__ import annotations

import multiprocessing
import os
import signal
import threading
import time
from collections.abc import Callable
from types import FrameType
from typing import Any, NoReturn

SIGNALS = (signal.SIGTERM, signal.SIGINT)
NOTICE = b"realign: saving before the end; a second signal ends at once\n"
# Signals within this time count as one: a scheduler that signals every process of a job reaches
# those that torchrun started twice, directly and through torchrun.
SECONDS_OF_ONE = 2.0


class Preemption:
    """Context manager that remembers whether a signal has asked this process to end.

    Handlers are set only in the main thread, where Python runs them.

    Attributes:
        is_requested: Whether the process was asked to end.
        is_waited_for: Not 0 within the block; shared with worker processes.
    """

    def __init__(self) -> None:
        self.is_requested = False
        self.is_waited_for = multiprocessing.RawValue("b", 0)
        self._number, self._first = int(signal.SIGTERM), 0.0
        self._previous: dict[signal.Signals, Any] = {}

    def __enter__(self) -> Preemption:
        self.is_requested = False
        self.is_waited_for.value = 1
        if threading.current_thread() is threading.main_thread():
            self._previous = {number: signal.signal(number, self._handle) for number in SIGNALS}
        return self

    def __exit__(self, *error: object) -> None:
        self.is_waited_for.value = 0
        while self._previous:
            number, previous = self._previous.popitem()
            signal.signal(number, previous or signal.SIG_DFL)  # None: it was not set from Python

    def end(self) -> NoReturn:
        """Raise KeyboardInterrupt after SIGINT, and SystemExit with code 143 after SIGTERM."""
        if self._number == signal.SIGINT:
            raise KeyboardInterrupt
        raise SystemExit(128 + self._number)

    def _handle(self, number: int, frame: FrameType | None) -> None:
        if not self.is_requested:
            self.is_requested, self._number, self._first = True, number, time.monotonic()
            os.write(2, NOTICE)  # not print, which the signal may have interrupted
        elif time.monotonic() - self._first > SECONDS_OF_ONE:
            os._exit(128 + number)  # a checkpoint that is being written stays invisible


def ignore_signals(then: Callable[[int], None] | None, is_waited_for: Any, worker: int) -> None:
    """Ignore signals in a worker process of a DataLoader, and call another ``worker_init_fn``, if
    any: a scheduler that signals a whole process group must not end the workers of a process that
    still has to save. When ``is_waited_for`` of the parent's :class:`Preemption` is 0, signals end
    the worker.
    """

    def handle(number: int, frame: FrameType | None) -> None:
        if not is_waited_for.value:
            os._exit(0)  # as torch's own handler does, so that the parent sees no failure

    for number in SIGNALS:
        signal.signal(number, handle)
    if then is not None:
        then(worker)
