"""The file that commits a cache: written last, it names every shard with its hash. What it does not
name is not read.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from realign.cache.disk import explained
from realign.cache.identity import SCHEMA, Identity, identity_sha256
from realign.cache.shards import REPAIR, WRITER, DamagedError, ShardEntry
from realign.errors import RefusedError
from realign.files import canonical_json, content_sha256, write_text

MANIFEST, IDENTITY = "manifest.json", "identity.json"
MAX_JSON_BYTES = 64 << 20


@dataclass(frozen=True)
class Manifest:
    """What a cache holds.

    Attributes:
        identity: SHA-256 of the identity.
        shards: Its shards, by number. Where two hold a row, the first counts.
        probe: How far the values move with the batch, see :mod:`realign.cache.probe`; None for
            imported values.
        written_by: Name and version of the program.
    """

    identity: str
    shards: tuple[ShardEntry, ...]
    probe: Mapping[str, Any] | None
    written_by: str = WRITER

    @property
    def rows(self) -> int:
        """How many rows the shards hold, a row in two of them counted twice."""
        return sum(shard.rows for shard in self.shards)

    @property
    def root(self) -> str:
        """One hash for all of it."""
        return content_sha256(canonical_json(self._content()))

    def _content(self) -> dict[str, Any]:
        return {
            "schema": SCHEMA,
            "written_by": self.written_by,
            "identity": self.identity,
            "rows": self.rows,
            "shards": [asdict(shard) for shard in self.shards],
            "probe": self.probe,
            "complete": True,  # a build that was stopped leaves none, or the one before it
        }

    def text(self) -> str:
        """The file's content."""
        return _spell(self._content() | {"root": self.root})


def write_manifest(place: Path, manifest: Manifest) -> None:
    """Commit; from here on readers see these shards and no others."""
    with explained(place / MANIFEST):
        write_text(place / MANIFEST, manifest.text())


def read_manifest(place: Path) -> Manifest | None:
    """What is committed in a folder; None if nothing is.

    Raises:
        DamagedError: It was changed after it was written.
        RefusedError: It is of another schema; the message says what wrote it.
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
    """Write what a folder's values are computed from."""
    with explained(place / IDENTITY):
        write_text(place / IDENTITY, _spell(identity))


def read_identity(place: Path) -> Identity:
    """What the values in a folder were computed from.

    Raises:
        DamagedError: It was changed after it was written.
        RefusedError: It is of another schema.
    """
    path = place / IDENTITY
    content, text = _read(path)
    if content.get("schema") != SCHEMA:
        raise RefusedError(_other_schema(path, content))
    if _spell(content) != text:
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


def _spell(content: Mapping[str, Any]) -> str:
    """The one spelling of a file, so that any changed byte shows."""
    return json.dumps(content, indent=1, sort_keys=True, ensure_ascii=True) + "\n"


def _other_schema(path: Path, content: Mapping[str, Any]) -> str:
    writer = content.get("written_by", "realign 0.1.0 or older")
    return (
        f"{path} must be of cache schema {SCHEMA}, got {content.get('schema')!r}, written by "
        f"{writer}; this is {WRITER}. Use that version, or build the cache again with this one."
    )
