"""Records with texts in memory and image files that are read on access."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from realign.data.images import MAX_BYTES
from realign.data.records import LazyRecords, Record


@dataclass(frozen=True)
class FileRow:
    """One checked row: a record without images, and the paths of its images."""

    record: Record
    images: tuple[Path, ...] = ()
    rejected_images: tuple[Path, ...] = ()


class FileRecords(LazyRecords):
    """Rows whose image files are read on access."""

    def __init__(self, rows: Sequence[FileRow]) -> None:
        self._rows = rows

    def __len__(self) -> int:
        return len(self._rows)

    def texts(self) -> Sequence[Record]:
        """Return the same rows; no image file is read."""
        return [row.record for row in self._rows]

    def _read(self, index: int) -> Record:
        row = self._rows[index]
        return dataclasses.replace(
            row.record,
            images=tuple(map(read_limited, row.images)),
            rejected_images=tuple(map(read_limited, row.rejected_images)),
        )


def read_limited(path: Path) -> bytes:
    """Return the bytes of an image file, or one byte more than is allowed if it is too large."""
    with path.open("rb") as file:
        return file.read(MAX_BYTES + 1)
