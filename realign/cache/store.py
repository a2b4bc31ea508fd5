"""An identity's folder: what is committed in it, and what a builder finds there."""

from __future__ import annotations

import os
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from realign.cache.disk import explained
from realign.cache.identity import Identity, identity_sha256
from realign.cache.manifest import (
    IDENTITY,
    MANIFEST,
    Manifest,
    check_identity,
    read_identity,
    read_manifest,
    write_identity,
    write_manifest,
)
from realign.cache.shards import (
    MAX_ROWS,
    REPAIR,
    DamagedError,
    Rows,
    Shard,
    ShardEntry,
    read_shard,
    shard_paths,
    write_shard,
)
from realign.progress import announce

DAMAGED = "damaged"  # where a builder puts what does not fit its hash


@dataclass(frozen=True)
class Committed:
    """A cache that was read and checked.

    Attributes:
        place: Its folder.
        identity: What it was computed from.
        manifest: What it holds.
        rows: The values.
    """

    place: Path
    identity: Identity
    manifest: Manifest
    rows: Rows

    @property
    def cells(self) -> int:
        """Values a row."""
        return self.rows.logps.shape[1]


def read_committed(place: Path) -> Committed | None:
    """Read what a folder's manifest commits, and check every byte of it; None without a manifest.

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
        DamagedError: It is not what the manifest says.
    """
    path = place / "shards" / entry.file
    shard = read_shard(path, entry)
    if (shard.cells, shard.identity, shard.entry) != (cells, manifest.identity, entry):
        raise DamagedError(
            f"{path} must be what {MANIFEST} says, got {shard.entry.rows} rows of {shard.cells} "
            f"cells of identity {shard.identity[:16]}. {REPAIR}"
        )
    return shard


@dataclass
class Workshop:
    """An identity's folder under the builder's lock.

    Attributes:
        place: The folder.
        identity: What its values are computed from.
        entries: Good shards in it, by number.
        rows: Their rows.
    """

    place: Path
    identity: Identity
    entries: list[ShardEntry]
    rows: Rows

    @classmethod
    def open(cls, place: Path, identity: Identity, *, repairs: bool) -> Workshop:
        """Look at every shard there, committed or left by a build that was stopped.

        Args:
            place: The folder.
            identity: What its values are computed from.
            repairs: Whether to move what is damaged aside, and to remove temporary files of dead
                processes; one process does.
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
        """The first number above all shards'."""
        return max((entry.index for entry in self.entries), default=-1) + 1

    def add(self, rows: Rows) -> None:
        """Write the rows that are not there yet; of equal keys the first."""
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
        """Let readers see what is there."""
        manifest = Manifest(identity_sha256(self.identity), tuple(self.entries), probe)
        write_manifest(self.place, manifest)


def _clean(place: Path, identity: Identity) -> None:
    with explained(place):
        (place / "shards").mkdir(parents=True, exist_ok=True)
        for left in (*place.glob(".*.tmp"), *(place / "shards").glob(".*.tmp")):
            left.unlink(missing_ok=True)
    try:
        if read_identity(place) == identity:
            if (manifest := read_manifest(place)) is not None:
                check_identity(place, identity, manifest)
            return
    except DamagedError as error:
        if there := [place / name for name in (IDENTITY, MANIFEST) if (place / name).exists()]:
            for path in there:
                _set_aside(path)
            announce(_without_remedy(error))
    write_identity(place, identity)


def _set_aside(path: Path) -> None:
    """Move a file to where nothing reads it, for whoever wants to know what happened to it."""
    folder = path.parent.parent / DAMAGED if path.parent.name == "shards" else path.parent / DAMAGED
    with explained(folder):
        folder.mkdir(exist_ok=True)
        number = sum(1 for _ in folder.iterdir())
        os.replace(path, folder / f"{number}-{path.name}")


def _without_remedy(error: DamagedError) -> str:
    """The remedy is what happens now."""
    return f"{str(error).removesuffix(REPAIR).rstrip()} Set aside in {DAMAGED}/, computed again"
