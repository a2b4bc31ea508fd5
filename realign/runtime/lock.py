"""One builder a cache: the second one waits. Where the file system has no locks, a file that is
created exclusively stands for one.
"""

from __future__ import annotations

import errno
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from filelock import BaseFileLock, FileLock, SoftFileLock, Timeout

from realign.runtime.files import explained
from realign.runtime.progress import announce

LOCK = "build.lock"
WITHOUT_LOCKS = (errno.ENOSYS, errno.ENOTSUP, errno.EOPNOTSUPP, errno.ENOLCK)


@contextmanager
def building(place: Path) -> Iterator[None]:
    """Hold an identity's folder for writing; wait while another build has it.

    The system lets go of the lock when the process ends, however it does; the file that stands for
    one is taken over when the process that it names is gone from this machine.

    Raises:
        RefusedError: The folder cannot be written.
    """
    with explained(place / LOCK):
        place.mkdir(parents=True, exist_ok=True)
        lock = _acquire(place)
    try:
        yield
    finally:
        lock.release()


def _acquire(place: Path) -> BaseFileLock:
    try:
        with warnings.catch_warnings():  # filelock may change over by itself, and says so
            warnings.filterwarnings("ignore", message="flock not supported")
            return _wait_for(FileLock(place / LOCK), place)
    except NotImplementedError:  # what filelock made of it before its version 3.13
        pass
    except OSError as error:
        if error.errno not in WITHOUT_LOCKS:
            raise
    return _wait_for(SoftFileLock(place / f"{LOCK}.soft"), place)


def _wait_for(lock: BaseFileLock, place: Path) -> BaseFileLock:
    try:
        lock.acquire(timeout=0)
    except Timeout:
        announce(
            f"another build writes {place}; waiting for it. If there is none, on no machine, "
            f"remove {lock.lock_file}"
        )
        lock.acquire()
    return lock
