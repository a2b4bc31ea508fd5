"""SIGTERM and SIGINT (Ctrl-C) in training: the first saves and ends, the second just ends."""

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
# A scheduler that signals every process of a job reaches one that torchrun started twice.
SECONDS_OF_ONE = 2.0


class Preemption:
    """Context that remembers whether this process was asked to end since the block began.

    The handler is set in the main thread of a program only, where Python runs handlers.

    Attributes:
        is_requested: Whether it was asked to end.
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
            self._previous = {one: signal.signal(one, self._handle) for one in SIGNALS}
        return self

    def __exit__(self, *error: object) -> None:
        self.is_waited_for.value = 0
        while self._previous:
            one, previous = self._previous.popitem()
            signal.signal(one, previous or signal.SIG_DFL)  # None: it was not set from Python

    def end(self) -> NoReturn:
        """Raise KeyboardInterrupt after SIGINT, and SystemExit with code 143 after SIGTERM."""
        if self._number == signal.SIGINT:
            raise KeyboardInterrupt
        raise SystemExit(128 + self._number)

    def _handle(self, number: int, frame: FrameType | None) -> None:
        if not self.is_requested:
            self.is_requested, self._number, self._first = True, number, time.monotonic()
            os.write(2, NOTICE)  # print could be what the signal interrupted
        elif time.monotonic() - self._first > SECONDS_OF_ONE:
            os._exit(128 + number)  # a save in progress is not there until it is whole


def ignore_signals(then: Callable[[int], None] | None, is_waited_for: Any, worker: int) -> None:
    """Ignore signals as the ``worker_init_fn`` of a DataLoader, and call ``then``: a scheduler that
    signals a whole process group must not end the workers of a process that still has to save. They
    end with their parent: outside the block of its :class:`Preemption` a signal ends them.
    """

    def handle(number: int, frame: FrameType | None) -> None:
        if not is_waited_for.value:
            os._exit(0)  # as torch's own handler: its parent must not take it for a failure

    for one in SIGNALS:
        signal.signal(one, handle)
    if then is not None:
        then(worker)
