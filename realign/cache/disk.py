"""What a file system refuses, said once."""

from __future__ import annotations

import errno
import os
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from realign.errors import RefusedError


@contextmanager
def explained(path: Path) -> Iterator[None]:
    """Turn a failed write of ``path`` into a message with the path and the error's name."""
    try:
        yield
    except OSError as error:
        if error.errno is None:
            raise
        name = errno.errorcode.get(error.errno, str(error.errno))
        raise RefusedError(
            f"{path} could not be written ({name}: {os.strerror(error.errno)}). Make room or "
            "choose another --out, and run the same command again; finished shards are kept."
        ) from error
