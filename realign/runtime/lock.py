"""Locks that one process at a time holds, also where the file system has none."""

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
    """Hold a lock file until the block ends; no other process or thread does meanwhile.

    The system lets go of it when the process ends, however it does. Where the file system has no
    locks, ``<path>.soft`` is created exclusively instead; it is taken over when the process that it
    names is gone from this machine.

    Args:
        path: The lock file, in a folder that exists.
        waiting: What to announce before waiting for another holder; nothing by default.
        refusal: Message of the refusal of a lock that another one holds; by default it is waited
            for.
    Raises:
        RefusedError: Another one holds it and there is a ``refusal``.
    """
    lock = _acquire(path, waiting, refusal)
    try:
        yield
    finally:
        lock.release()


def _acquire(path: Path, waiting: str, refusal: str) -> BaseFileLock:
    try:
        with warnings.catch_warnings():  # filelock may change over by itself, and says so
            warnings.filterwarnings("ignore", message="flock not supported")
            return _take(FileLock(path, thread_local=False), waiting, refusal)
    except NotImplementedError:  # what filelock made of it before its version 3.13
        pass
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
