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
def explain_full_disk() -> Iterator[None]:
    """Turn the error of a full or read-only disk inside the block into a refusal, if it names a
    file, as the errors of :mod:`realign.runtime.files` do.
    """
    try:
        yield
    except OSError as error:
        if error.errno is None or error.errno not in UNWRITABLE or error.filename is None:
            raise
        raise _refusal(str(error.filename), _reason(error.errno)) from error


def _reason(number: int) -> str:
    return f"{errno.errorcode.get(number, number)}: {os.strerror(number)}"


def _refusal(file: str, reason: str) -> RefusedError:
    return RefusedError(
        f"{file} could not be written ({reason}). Make room or choose another --out, and run the "
        "same command again; what is finished is kept."
    )
