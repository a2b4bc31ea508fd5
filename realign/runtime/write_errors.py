"""Refusals of files that cannot be written, with the path, the error's name and a remedy."""

from __future__ import annotations

import errno
import os
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from realign.errors import RefusedError
from realign.runtime.files import UNWRITABLE


@contextmanager
def explain_write_errors(path: Path) -> Iterator[None]:
    """Turn any error of the system inside the block into the refusal that ``path`` could not be
    written.
    """
    try:
        yield
    except OSError as error:
        if error.errno is None:
            raise
        raise _refusal(str(path), error.errno) from error


@contextmanager
def explain_full_disk() -> Iterator[None]:
    """Turn the error of a full or read-only disk inside the block into a refusal. It names the file
    if the error does, as those of :mod:`realign.runtime.files` do.
    """
    try:
        yield
    except OSError as error:
        if error.errno not in UNWRITABLE or error.errno is None:
            raise
        raise _refusal(str(error.filename or "a file"), error.errno) from error


def _refusal(file: str, number: int) -> RefusedError:
    name = errno.errorcode.get(number, str(number))
    return RefusedError(
        f"{file} could not be written ({name}: {os.strerror(number)}). Make room or choose another "
        "--out, and run the same command again; what is finished is kept."
    )
