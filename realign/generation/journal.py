"""Append-only journal of a server's answers: no request is sent twice, even after ``kill -9``.

It has one JSON object per line, identified by the hash of its request. An answer is in the file
before it is used, and from then on survives the death of the process. Power loss can cost the
answers of the last second of a running call, but none of a call that has returned.
"""

from __future__ import annotations

import json
import os
import time
from collections.abc import Mapping
from contextlib import ExitStack
from pathlib import Path
from types import TracebackType
from typing import Any

from realign.errors import RefusedError
from realign.runtime.files import finite_or_null, json_text, name_disk_errors, sync
from realign.runtime.lock import locked

SYNC_INTERVAL_S = 1.0


class Journal:
    """Append-only JSONL file that one process at a time may hold open.

    Only the offset of each line is kept in memory. The lock is on a file beside the journal; the
    system releases it when the process dies.

    Args:
        path: The file, which is created if it does not exist. A last line that a killed process
            left incomplete is removed.
    Raises:
        RefusedError: The journal is open elsewhere, or a line is damaged.
    """

    def __init__(self, path: Path) -> None:
        self.path = path
        self._offsets: dict[str, int] = {}
        self._synced_at = time.monotonic()
        path.parent.mkdir(parents=True, exist_ok=True)
        self._lock = ExitStack()
        refusal = (
            f"journal {path} is being written by another run. Wait for it, or choose another "
            "output folder."
        )
        self._lock.enter_context(locked(path.with_name(f"{path.name}.lock"), refusal=refusal))
        try:
            self._end = self._read()
            self._file = path.open("ab", buffering=0)
            sync(path.parent)  # so that a new file's name is on the disk too
        except BaseException:
            self._lock.close()
            raise

    def __enter__(self) -> Journal:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        tb: TracebackType | None,
    ) -> None:
        self.close()

    def __len__(self) -> int:
        return len(self._offsets)

    def __contains__(self, key: str) -> bool:
        return key in self._offsets

    def __getitem__(self, key: str) -> dict[str, Any]:
        with self.path.open("rb") as file:
            file.seek(self._offsets[key])
            entry: dict[str, Any] = json.loads(file.readline())
        return entry

    def append(self, key: str, entry: Mapping[str, Any]) -> None:
        """Write one line, which then survives the death of the process. It survives power loss
        after :meth:`sync`, which is called from here once per second.
        """
        assert key not in self._offsets, key
        # a server's numbers need not be finite
        line = json_text(finite_or_null({"key": key, **entry}), ensure_ascii=True).encode() + b"\n"
        left = memoryview(line)
        try:
            with name_disk_errors(self.path):
                while left:
                    left = left[self._file.write(left) :]
        except OSError:  # on a full disk, half a line must not stay before the next one
            os.truncate(self.path, self._end)
            raise
        self._offsets[key] = self._end
        self._end += len(line)
        if time.monotonic() - self._synced_at >= SYNC_INTERVAL_S:
            self.sync()

    def sync(self) -> None:
        """Wait until every line is on the disk."""
        with name_disk_errors(self.path):
            os.fsync(self._file.fileno())
        self._synced_at = time.monotonic()

    def close(self) -> None:
        """Sync, close and unlock. Closing again does nothing."""
        if self._file.closed:
            return
        try:
            self.sync()
        finally:
            self._file.close()
            self._lock.close()

    def _read(self) -> int:
        """Index the lines, and remove an incomplete last line. Return the size of the file."""
        end = 0
        if not self.path.exists():
            return end
        with self.path.open("rb") as file:
            for number, line in enumerate(file, start=1):
                if not line.endswith(b"\n"):
                    break
                self._offsets.setdefault(self._key_of(line, number), end)
                end += len(line)
        if end < self.path.stat().st_size:
            os.truncate(self.path, end)
        return end

    def _key_of(self, line: bytes, number: int) -> str:
        try:
            key = json.loads(line)["key"]
        except (ValueError, KeyError, TypeError):
            key = None
        if not isinstance(key, str):
            raise RefusedError(
                f"{self.path}, line {number} must be a journal entry, got {line[:60]!r}. Remove "
                "the line: its request is then asked again."
            )
        return key
