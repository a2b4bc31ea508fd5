"""Shards: immutable files of rows, named by their content and checked before use.

    shards/00017-<sha256, 16 digits>.safetensors
        key           u8[n, 32]     SHA-256 of the row's content
        logps         f64[n, C]     summed log-probabilities
        num_tokens    i32[n, C]     scored tokens; 0 where the cell does not exist
        token_digest  u8[n, C, 16]  digest of token ids and labels, see modeling/collate.py
        pixel_digest  u8[n, 2, 16]  digest of the pixels of the original and the retrieved images

The header holds a single entry ``realign`` of canonical JSON: safetensors writes several entries in
any order, and equal rows must give equal bytes.
"""

from __future__ import annotations

import hashlib
import json
import os
import re
from collections.abc import Iterator
from dataclasses import dataclass
from importlib.metadata import version
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import safetensors.numpy

from realign.errors import RefusedError
from realign.modeling.identity import SCHEMA
from realign.runtime.files import canonical_json, replacing
from realign.runtime.write_errors import explain_write_errors

MAX_ROWS = 10_000
MAX_HEADER_BYTES = 1 << 20
MAX_SHARD_BYTES = MAX_HEADER_BYTES + MAX_ROWS * 200  # a row of four cells has 176
WRITER = f"realign {version('realign')}"
# name -> dtype and the shape after the rows; None stands for C
COLUMNS: dict[str, tuple[type[np.generic], tuple[int | None, ...]]] = {
    "key": (np.uint8, (32,)),
    "logps": (np.float64, (None,)),
    "num_tokens": (np.int32, (None,)),
    "token_digest": (np.uint8, (None, 16)),
    "pixel_digest": (np.uint8, (2, 16)),
}
REPAIR = "Run `realign cache` with the same options: it sets the file aside and computes its rows."
_NAME = re.compile(r"(\d{5,})-([0-9a-f]{16})\.safetensors")


class DamagedError(RefusedError):
    """A file of a cache differs from what was written."""


@dataclass(frozen=True)
class Rows:
    """Cached rows, as arrays with one entry per row; dtypes and shapes are those of the file."""

    key: np.ndarray
    logps: np.ndarray
    num_tokens: np.ndarray
    token_digest: np.ndarray
    pixel_digest: np.ndarray

    def __len__(self) -> int:
        return len(self.key)

    @property
    def columns(self) -> tuple[np.ndarray, ...]:
        """The arrays, in the order of ``COLUMNS``."""
        return (self.key, self.logps, self.num_tokens, self.token_digest, self.pixel_digest)

    def take(self, indices: np.ndarray | slice) -> Rows:
        """Return the rows at some indices, in their order."""
        return Rows(*(array[indices] for array in self.columns))

    @staticmethod
    def concat(parts: list[Rows], cells: int) -> Rows:
        """Return all rows of several parts, which have ``cells`` cells."""
        columns = zip(*(part.columns for part in [Rows.empty(cells), *parts]), strict=True)
        return Rows(*(np.concatenate(arrays) for arrays in columns))

    @staticmethod
    def empty(cells: int) -> Rows:
        """Return zero rows of ``cells`` cells."""
        return Rows(
            *(
                np.zeros((0, *(cells if size is None else size for size in shape)), dtype)
                for dtype, shape in COLUMNS.values()
            )
        )


@dataclass(frozen=True)
class ShardEntry:
    """Entry of a manifest for one shard."""

    file: str
    rows: int
    bytes: int
    sha256: str

    @property
    def index(self) -> int:
        """The shard's number."""
        return int(self.file.partition("-")[0])


def shard_paths(place: Path) -> Iterator[Path]:
    """Return the files of an identity's folder that have names of shards, by number."""
    found = [path for path in (place / "shards").glob("*") if _NAME.fullmatch(path.name)]
    return iter(sorted(found, key=lambda path: (int(path.name.partition("-")[0]), path.name)))


def encode_shard(rows: Rows, identity: str, index: int) -> bytes:
    """Return a shard file's bytes; equal rows give equal bytes.

    Raises:
        FloatingPointError: A log-probability is not finite.
    """
    if not np.isfinite(rows.logps).all():
        raise FloatingPointError("log-probabilities must be finite to be stored, got NaN or inf.")
    tensors = {
        name: np.ascontiguousarray(array) for name, array in zip(COLUMNS, rows.columns, strict=True)
    }
    plain = safetensors.numpy.save(tensors)
    payload = plain[8 + int.from_bytes(plain[:8], "little") :]
    header = {
        "schema": SCHEMA,
        "written_by": WRITER,
        "identity": identity,
        "index": index,
        "rows": len(rows),
        "payload_sha256": hashlib.sha256(payload).hexdigest(),
    }
    return safetensors.numpy.save(tensors, metadata={"realign": canonical_json(header)})


def write_shard(place: Path, rows: Rows, identity: str, index: int) -> ShardEntry:
    """Write rows as shard ``index``, synced to the disk; whole or not at all.

    Raises:
        RefusedError: The disk is full, read-only or failing.
        FloatingPointError: A log-probability is not finite.
    """
    data = encode_shard(rows, identity, index)
    sha256 = hashlib.sha256(data).hexdigest()
    path = place / "shards" / f"{index:05d}-{sha256[:16]}.safetensors"
    with explain_write_errors(path), replacing(path) as temporary, temporary.open("wb") as file:
        file.write(data)
        file.flush()
        os.fsync(file.fileno())  # failed writes are reported to the descriptor that wrote
    return ShardEntry(path.name, len(rows), len(data), sha256)


class Shard(NamedTuple):
    """A shard that was read and checked.

    Attributes:
        entry: Its entry for a manifest.
        rows: Its rows.
        cells: Number of cells of every row.
        identity: SHA-256 of the identity that it belongs to.
    """

    entry: ShardEntry
    rows: Rows
    cells: int
    identity: str


def read_shard(path: Path, entry: ShardEntry | None = None) -> Shard:
    """Read a shard and check all of it.

    Args:
        path: The file.
        entry: Its entry in the manifest; without one, the file is checked against the hashes in its
            own name and header.
    Raises:
        DamagedError: The file is missing, cannot be read, or was changed.
        RefusedError: The file has another schema.
    """
    try:
        size = path.stat().st_size
        if size > MAX_SHARD_BYTES:
            raise DamagedError(
                f"{path} must have at most {MAX_SHARD_BYTES} bytes, got {size}. {REPAIR}"
            )
        if entry is not None and size != entry.bytes:
            raise DamagedError(f"{path} must have {entry.bytes} bytes, got {size}. {REPAIR}")
        data = path.read_bytes()
    except FileNotFoundError:
        raise DamagedError(f"{path} is in the manifest but does not exist. {REPAIR}") from None
    except OSError as error:
        raise DamagedError(f"{path} cannot be read ({error.strerror}). {REPAIR}") from None
    sha256 = hashlib.sha256(data).hexdigest()
    named = _NAME.fullmatch(path.name)
    if (entry is not None and sha256 != entry.sha256) or not named or named[2] != sha256[:16]:
        raise DamagedError(f"{path} was changed after it was written. {REPAIR}")
    header, rows = _decode(data, path, is_known=entry is not None)
    if int(named[1]) != header["index"]:
        raise DamagedError(f"{path} is shard {header['index']} by its header. {REPAIR}")
    if not np.isfinite(rows.logps).all():
        raise DamagedError(f"{path} holds a log-probability that is not finite. {REPAIR}")
    found = ShardEntry(path.name, len(rows), len(data), sha256)
    return Shard(found, rows, rows.logps.shape[1], str(header["identity"]))


def _decode(data: bytes, path: Path, *, is_known: bool) -> tuple[dict[str, Any], Rows]:
    """Return the header and the rows after checking every dtype and shape.

    Args:
        data: Bytes of the file.
        path: The file, for messages.
        is_known: Whether a manifest holds the hash of the file; if not, the hash of the payload in
            the header is checked.
    """

    def damaged(reason: str) -> DamagedError:
        return DamagedError(f"{path} is not a shard of `realign cache`: {reason}. {REPAIR}")

    length = int.from_bytes(data[:8], "little")
    if length > MAX_HEADER_BYTES:
        raise damaged(f"its header has {length} bytes, of at most {MAX_HEADER_BYTES}")
    try:
        header = json.loads(json.loads(data[8 : 8 + length])["__metadata__"]["realign"])
        schema, num_rows, _ = header["schema"], int(header["rows"]), header["identity"]
    except (ValueError, KeyError, TypeError, AttributeError, RecursionError) as error:
        raise damaged(f"its header is not that of a shard ({error!r})") from None
    if schema != SCHEMA:
        raise RefusedError(
            f"{path} must be of cache schema {SCHEMA}, got {schema}, written by "
            f"{header.get('written_by', 'an older realign')}. Use that version, or build again."
        )
    try:
        tensors = safetensors.numpy.load(data)  # refuses columns that overlap or leave gaps
    except (safetensors.SafetensorError, ValueError, KeyError) as error:
        raise damaged(f"its columns do not fit its bytes ({error})") from None
    cells = tensors["logps"].shape[-1] if "logps" in tensors and tensors["logps"].ndim else 0
    if not 1 <= cells <= 4 or not 0 <= num_rows <= MAX_ROWS:
        raise damaged(f"it has {num_rows} rows of {cells} cells")
    expected = {
        name: (np.dtype(dtype), (num_rows, *(cells if size is None else size for size in shape)))
        for name, (dtype, shape) in COLUMNS.items()
    }
    if (found := {name: (array.dtype, array.shape) for name, array in tensors.items()}) != expected:
        raise damaged(f"its columns must be {expected}, got {found}")
    payload = memoryview(data)[8 + length :]
    if not is_known and hashlib.sha256(payload).hexdigest() != header["payload_sha256"]:
        raise damaged("its header holds the hash of other content")
    return header, Rows(*(tensors[name] for name in COLUMNS))
