"""The distinct images of a source: what retrieval chooses from."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path

from realign.build.row import SourceRow
from realign.files import file_sha256


@dataclass(frozen=True)
class Corpus:
    """The distinct images of a source, by content: byte duplicates are one image."""

    names: list[str]
    paths: list[Path]
    digests: list[str]

    @classmethod
    def of(cls, rows: Iterable[SourceRow]) -> Corpus:
        """Collect the images of ``rows`` in order of first appearance."""
        found: dict[str, tuple[str, Path]] = {}
        seen: set[Path] = set()
        for row in rows:
            if row.path not in seen:
                seen.add(row.path)
                found.setdefault(file_sha256(row.path), (row.image, row.path))
        return cls(
            [name for name, _ in found.values()], [path for _, path in found.values()], list(found)
        )
