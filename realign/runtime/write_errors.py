"""Refusals of files that cannot be written, with the path, the error's name and a remedy."""

from __future__ import annotations

import errno
import os
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from safetensors import SafetensorError

from realign.errors import RefusedError
from realign.runtime.files import UNWRITABLE

# the errors of missing permissions, and of files and folders in each other's place
UNUSABLE = frozenset(
    {errno.EACCES, errno.EPERM, errno.EEXIST, errno.EISDIR, errno.ENOTDIR}
    | {errno.ENAMETOOLONG, errno.ELOOP, errno.EBUSY}
)


@contextmanager
def explain_write_errors(path: Path) -> Iterator[None]:
    """Turn any error of the system, or of safetensors, inside the block into the refusal that
    ``path`` could not be written.
    """
    try:
        yield
    except OSError as error:
        if error.errno is None:
            raise
        raise _refusal(str(path), _reason(error.errno)) from error
    except SafetensorError as error:  # it has no number
        raise _refusal(str(path), str(error)) from error


@contextmanager
def explain_file_errors() -> Iterator[None]:
    """Turn errors of the system inside the block that a user can correct into refusals, if they
    name a file: a full or read-only disk, missing permissions, and names that cannot be opened.
    """
    try:
        yield
    except OSError as error:
        file, number = error.filename, error.errno
        if file is None or number is None:
            raise
        if number in UNWRITABLE:
            raise _refusal(str(file), _reason(number)) from error
        if number in UNUSABLE:
            raise RefusedError(
                f"{file} must be a path that can be opened, got {_reason(number)}. Correct its "
                "name or its permissions, or choose another."
            ) from error
        raise


def _reason(number: int) -> str:
    return f"{errno.errorcode.get(number, number)}: {os.strerror(number)}"


def _refusal(file: str, reason: str) -> RefusedError:
    return RefusedError(
        f"{file} could not be written ({reason}). Make room or choose another --out, and run the "
        "same command again; what is finished is kept."
    )
