"""Locks between processes, also on file systems that do not support locks."""

from __future__ import annotations

import errno
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from filelock import BaseFileLock, FileLock, SoftFileLock, Timeout

from realign.errors import RefusedError
from realign.runtime.progress import announce

WITHOUT_LOCKS = (errno.ENOSYS, errno.ENOTSUP, errno.EOPNOTSUPP, errno.ENOLCK)
_POLL_SECONDS = 0.02


@contextmanager
def locked(path: Path, *, waiting: str = "", refusal: str = "") -> Iterator[None]:
    """Hold a lock file within the block, while no other process or thread can.

    The system releases it when the process ends, even if it is killed. On a file system without
    locks, ``<path>.soft`` is created exclusively instead; it is taken over if its process has ended
    on this machine.

    Args:
        path: Lock file, in an existing folder.
        waiting: Message to announce before waiting for another holder; none by default.
        refusal: Message of the refusal if another holds the lock; by default it is waited for.
    Raises:
        RefusedError: Another holds the lock and ``refusal`` is given.
    """
    lock = _acquire(path, waiting, refusal)
    try:
        yield
    finally:
        lock.release()


def _acquire(path: Path, waiting: str, refusal: str) -> BaseFileLock:
    try:
        with warnings.catch_warnings():  # filelock warns when it switches to soft locks by itself
            warnings.filterwarnings("ignore", message="flock not supported")
            return _take(FileLock(path, thread_local=False), waiting, refusal)
    except OSError as error:
        if error.errno not in WITHOUT_LOCKS:
            raise
    return _take(SoftFileLock(f"{path}.soft", thread_local=False), waiting, refusal)


def _take(lock: BaseFileLock, waiting: str, refusal: str) -> BaseFileLock:
    try:
        lock.acquire(timeout=0)
    except Timeout:
        if refusal:
            raise RefusedError(refusal) from None
        if waiting:
            announce(f"{waiting}. If there is none, on no machine, remove {lock.lock_file}")
        lock.acquire(poll_interval=_POLL_SECONDS)
    return lock
