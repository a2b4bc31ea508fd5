"""The folder of one identity, as readers see it (a committed manifest and its shards) and as the
builder does (under a lock).
"""

from __future__ import annotations

import json
import os
from collections.abc import Iterator, Mapping
from contextlib import ExitStack, contextmanager
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np

from realign.errors import RefusedError
from realign.modeling.identity import SCHEMA, Identity, identity_sha256
from realign.reference.shards import (
    MAX_ROWS,
    REPAIR,
    WRITER,
    DamagedError,
    Rows,
    Shard,
    ShardEntry,
    read_shard,
    shard_paths,
    write_shard,
)
from realign.runtime.files import (
    canonical_json,
    content_sha256,
    json_text,
    write_text,
)
from realign.runtime.lock import locked
from realign.runtime.progress import announce
from realign.runtime.write_errors import explain_write_errors

MANIFEST, IDENTITY, LOCK = "manifest.json", "identity.json", "build.lock"
MAX_JSON_BYTES = 64 << 20
DAMAGED = "damaged"  # folder for files that do not fit their hash


@dataclass(frozen=True)
class Manifest:
    """The shards of a cache, as its manifest lists them.

    Attributes:
        identity: SHA-256 of the identity.
        shards: Its shards, by number. If two hold the same row, the first counts.
        probe: Change of the values by batching, see :mod:`realign.reference.probe`; None for
            imported values.
        written_by: Name and version of the program.
    """

    identity: str
    shards: tuple[ShardEntry, ...]
    probe: Mapping[str, Any] | None
    written_by: str = WRITER

    @property
    def rows(self) -> int:
        """Number of rows of all shards; a row in two shards counts twice."""
        return sum(shard.rows for shard in self.shards)

    @property
    def root(self) -> str:
        """Hash of the whole manifest."""
        return content_sha256(canonical_json(self._content()))

    def _content(self) -> dict[str, Any]:
        return {
            "schema": SCHEMA,
            "written_by": self.written_by,
            "identity": self.identity,
            "rows": self.rows,
            "shards": [asdict(shard) for shard in self.shards],
            "probe": self.probe,
            "complete": True,  # a stopped build leaves no manifest, or the previous one
        }

    def text(self) -> str:
        """Return the file's content."""
        return _canonical_text(self._content() | {"root": self.root})


def write_manifest(place: Path, manifest: Manifest) -> None:
    """Commit a manifest: from then on, readers see these shards and no others."""
    with explain_write_errors(place / MANIFEST):
        write_text(place / MANIFEST, manifest.text())


def read_manifest(place: Path) -> Manifest | None:
    """Return the manifest of a folder; None if there is none.

    Raises:
        DamagedError: It was changed after it was written.
        RefusedError: It has another schema; the message names the program that wrote it.
    """
    path = place / MANIFEST
    if not path.is_file():
        return None
    content, text = _read(path)
    if content.get("schema") != SCHEMA:
        raise RefusedError(_other_schema(path, content))
    try:
        manifest = Manifest(
            identity=content["identity"],
            shards=tuple(ShardEntry(**shard) for shard in content["shards"]),
            probe=content["probe"],
            written_by=content["written_by"],
        )
        is_whole = manifest.text() == text
    except (KeyError, TypeError, AttributeError, ValueError):
        is_whole = False
    if not is_whole:
        raise DamagedError(f"{path} was changed after it was written. {REPAIR}")
    return manifest


def write_identity(place: Path, identity: Identity) -> None:
    """Write the identity of a folder's values."""
    with explain_write_errors(place / IDENTITY):
        write_text(place / IDENTITY, _canonical_text(identity))


def read_identity(place: Path) -> Identity:
    """Return the identity of the values in a folder.

    Raises:
        DamagedError: It was changed after it was written.
        RefusedError: It is of another schema.
    """
    path = place / IDENTITY
    content, text = _read(path)
    if content.get("schema") != SCHEMA:
        raise RefusedError(_other_schema(path, content))
    if _canonical_text(content) != text:
        raise DamagedError(f"{path} was changed after it was written. {REPAIR}")
    return content


def check_identity(place: Path, identity: Identity, manifest: Manifest) -> None:
    """Refuse a manifest that commits the values of another identity."""
    if identity_sha256(identity) != manifest.identity:
        raise DamagedError(
            f"{place / MANIFEST} is of identity {manifest.identity[:16]}, {place / IDENTITY} of "
            f"{identity_sha256(identity)[:16]}. {REPAIR}"
        )


def _read(path: Path) -> tuple[dict[str, Any], str]:
    try:
        if path.stat().st_size > MAX_JSON_BYTES:
            raise DamagedError(f"{path} must have at most {MAX_JSON_BYTES} bytes. {REPAIR}")
        text = path.read_text(encoding="utf-8")
        content = json.loads(text)
    except (OSError, ValueError, RecursionError) as error:
        if isinstance(error, RefusedError):
            raise
        raise DamagedError(f"{path} cannot be read ({error}). {REPAIR}") from None
    if not isinstance(content, dict):
        raise DamagedError(f"{path} must hold a JSON object. {REPAIR}")
    return content, text


def _canonical_text(content: Mapping[str, Any]) -> str:
    """Return the canonical text of a file, so that any changed byte is noticed."""
    return json_text(content, indent=1, sort_keys=True, ensure_ascii=True) + "\n"


def _other_schema(path: Path, content: Mapping[str, Any]) -> str:
    writer = content.get("written_by", "realign 0.1.0 or older")
    return (
        f"{path} must be of cache schema {SCHEMA}, got {content.get('schema')!r}, written by "
        f"{writer}; this is {WRITER}. Use that version, or build the cache again with this one."
    )


@dataclass(frozen=True)
class Committed:
    """A cache that was read and checked.

    Attributes:
        place: Its folder.
        identity: Identity of its values.
        manifest: Its manifest.
        rows: The values.
    """

    place: Path
    identity: Identity
    manifest: Manifest
    rows: Rows

    @property
    def cells(self) -> int:
        """Values per row."""
        return self.rows.logps.shape[1]


def read_committed(place: Path) -> Committed | None:
    """Read and check the values that a folder's manifest commits; None without a manifest.

    Raises:
        DamagedError: Something was changed after it was written.
        RefusedError: It is of another schema.
    """
    manifest = read_manifest(place)
    if manifest is None:
        return None
    identity = read_identity(place)
    check_identity(place, identity, manifest)
    cells = int(identity["semantics"]["cells"])
    shards = [read_committed_shard(place, entry, manifest, cells) for entry in manifest.shards]
    return Committed(place, identity, manifest, Rows.concat([s.rows for s in shards], cells))


def read_committed_shard(place: Path, entry: ShardEntry, manifest: Manifest, cells: int) -> Shard:
    """Read one of a manifest's shards.

    Raises:
        DamagedError: It differs from the manifest's entry.
    """
    path = place / "shards" / entry.file
    shard = read_shard(path, entry)
    if (shard.cells, shard.identity, shard.entry) != (cells, manifest.identity, entry):
        raise DamagedError(
            f"{path} must be what {MANIFEST} says, got {shard.entry.rows} rows of {shard.cells} "
            f"cells of identity {shard.identity[:16]}. {REPAIR}"
        )
    return shard


@contextmanager
def building(place: Path) -> Iterator[None]:
    """Lock an identity's folder for writing; wait while another build holds it.

    Raises:
        RefusedError: The folder cannot be written.
    """
    with ExitStack() as stack:
        with explain_write_errors(place / LOCK):
            place.mkdir(parents=True, exist_ok=True)
            waiting = f"another build writes {place}; waiting for it"
            stack.enter_context(locked(place / LOCK, waiting=waiting))
        yield


@dataclass
class LockedCache:
    """An identity's folder under the builder's lock.

    Attributes:
        place: The folder.
        identity: Identity of its values.
        entries: Intact shards of the folder, by number.
        rows: Rows of these shards.
    """

    place: Path
    identity: Identity
    entries: list[ShardEntry]
    rows: Rows

    @classmethod
    def open(cls, place: Path, identity: Identity, *, repairs: bool) -> LockedCache:
        """Read every shard of a folder, committed or left by a stopped build.

        Args:
            place: The folder.
            identity: Identity of its values.
            repairs: Whether to move damaged files aside and to remove temporary files of killed
                processes. Only one process may do so.
        """
        if repairs:
            _clean(place, identity)
        cells = int(identity["semantics"]["cells"])
        sha256 = identity_sha256(identity)
        shards = []
        for path in shard_paths(place):
            try:
                shard = read_shard(path)
                if (shard.cells, shard.identity) != (cells, sha256):
                    raise DamagedError(f"{path} is of another identity.")
            except DamagedError as error:
                if repairs:
                    _set_aside(path)
                    announce(_without_remedy(error))
                continue
            shards.append(shard)
        rows = Rows.concat([shard.rows for shard in shards], cells)
        return cls(place, identity, [shard.entry for shard in shards], rows)

    @property
    def next_index(self) -> int:
        """Number of the next shard, above those of all shards."""
        return max((entry.index for entry in self.entries), default=-1) + 1

    def add(self, rows: Rows) -> None:
        """Write the rows that are not stored yet; of rows with equal keys, the first one."""
        every = Rows.concat([self.rows, rows], self.rows.logps.shape[1])
        keys = np.ascontiguousarray(every.key).view("V32")[:, 0]
        first = np.unique(keys, return_index=True)[1]
        new = np.sort(first[first >= len(self.rows)])
        for start in range(0, len(new), MAX_ROWS):
            part = every.take(new[start : start + MAX_ROWS])
            sha256 = identity_sha256(self.identity)
            self.entries.append(write_shard(self.place, part, sha256, self.next_index))
        self.rows = every.take(np.concatenate([np.arange(len(self.rows)), new]))

    def commit(self, probe: Mapping[str, Any] | None) -> None:
        """Write the manifest, so that readers see the shards.

        Args:
            probe: Result of :func:`realign.reference.probe.run_probe`, or None without a probe.
        """
        manifest = Manifest(identity_sha256(self.identity), tuple(self.entries), probe)
        write_manifest(self.place, manifest)


def _clean(place: Path, identity: Identity) -> None:
    with explain_write_errors(place):
        (place / "shards").mkdir(parents=True, exist_ok=True)
        for temporary in (*place.glob(".*.tmp"), *(place / "shards").glob(".*.tmp")):
            temporary.unlink(missing_ok=True)
    try:
        if read_identity(place) == identity:
            if (manifest := read_manifest(place)) is not None:
                check_identity(place, identity, manifest)
            return
    except DamagedError as error:
        if damaged := [place / name for name in (IDENTITY, MANIFEST) if (place / name).exists()]:
            for path in damaged:
                _set_aside(path)
            announce(_without_remedy(error))
    write_identity(place, identity)


def _set_aside(path: Path) -> None:
    """Move a file into the folder of damaged files, where it can be examined."""
    folder = path.parent.parent / DAMAGED if path.parent.name == "shards" else path.parent / DAMAGED
    with explain_write_errors(folder):
        folder.mkdir(exist_ok=True)
        number = sum(1 for _ in folder.iterdir())
        os.replace(path, folder / f"{number}-{path.name}")


def _without_remedy(error: DamagedError) -> str:
    """Return the message without its remedy, which is being applied."""
    return f"{str(error).removesuffix(REPAIR).rstrip()} Set aside in {DAMAGED}/, computed again"
