"""Write files and folders that are either whole or absent, since they are written under a temporary
name, synced and renamed. Also read and hash files.
"""

from __future__ import annotations

import errno
import hashlib
import json
import math
import os
import re
import shutil
import tempfile
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from realign.errors import RefusedError

REMOVING = ".removing"
# the errors of a disk that is full, over its quota or read-only, and of a file over its limit
UNWRITABLE = frozenset({errno.ENOSPC, errno.EDQUOT, errno.EROFS, errno.EFBIG})


@contextmanager
def replacing(path: Path) -> Iterator[Path]:
    """Yield a temporary path that becomes ``path`` after the block, and disappears if it fails."""
    temporary = path.with_name(f".{path.name}.{os.getpid()}.tmp")
    with name_disk_errors(path):
        path.parent.mkdir(parents=True, exist_ok=True)
        try:
            yield temporary
            follow_umask(temporary)
            sync(temporary)
            temporary.replace(path)
        finally:
            temporary.unlink(missing_ok=True)  # on a read-only disk, this fails too
    sync(path.parent)


def is_unfinished(path: Path) -> bool:
    """Return whether a path is a temporary file of :func:`replacing` by a killed process."""
    return re.fullmatch(r"\..+\.\d+\.tmp", path.name) is not None and path.is_file()


def follow_umask(path: Path) -> None:
    """Give a file or a folder the permissions that ``open`` or ``mkdir`` would give it, since
    safetensors writes files with 0600 and ``mkdtemp`` makes folders with 0700.
    """
    mask = os.umask(0o077)  # the mask can only be read by setting it
    os.umask(mask)
    path.chmod((0o777 if path.is_dir() else 0o666) & ~mask)


def write_text(path: Path, text: str) -> None:
    """Write ``text`` to ``path``, whole or not at all."""
    with replacing(path) as temporary:
        temporary.write_text(text, encoding="utf-8")


def write_unsynced(path: Path, raw: bytes) -> None:
    """Write a file whole or not at all, but do not wait for the disk: a power cut may lose it."""
    temporary = path.with_name(f".{path.name}.{os.getpid()}.tmp")
    try:
        temporary.write_bytes(raw)
        temporary.replace(path)
    finally:
        temporary.unlink(missing_ok=True)


def json_text(value: Any, **options: Any) -> str:
    """Return ``value`` as JSON. This package writes all its JSON through this function.

    Args:
        value: A value of JSON types. Pass a measurement that may be undefined through
            :func:`finite_or_null` first.
        options: Options of ``json.dumps``. Letters are not escaped by default.
    Raises:
        ValueError: A number is not finite: ``NaN`` is not JSON, and other readers refuse it.
    """
    return json.dumps(value, **{"ensure_ascii": False, **options}, allow_nan=False)


def finite_or_null(value: Any) -> Any:
    """Return a copy of JSON data in which each number that is not finite is None."""
    if isinstance(value, float):
        return value if math.isfinite(value) else None
    if isinstance(value, Mapping):
        return {key: finite_or_null(item) for key, item in value.items()}
    return [*map(finite_or_null, value)] if isinstance(value, list | tuple) else value


def write_json(path: Path, value: Any) -> None:
    """Write ``value`` as indented JSON, whole or not at all."""
    write_text(path, json_text(value, indent=2) + "\n")


def write_jsonl(path: Path, rows: Iterable[Any]) -> None:
    """Write one JSON value per line, whole or not at all."""
    write_text(path, "".join(json_text(row) + "\n" for row in rows))


def read_jsonl(path: Path) -> list[Any]:
    """Read a JSON lines file that this project wrote. Files of others are read by
    :func:`realign.runtime.strict_json.iter_jsonl`.

    Raises:
        RefusedError: The file is not UTF-8, or a line is not JSON; the message names it.
    """
    # not splitlines(): a JSON string may hold U+2028 and other line ends as they are
    lines = read_utf8(path).removesuffix("\n").split("\n")
    rows = []
    for number, line in enumerate(lines if lines != [""] else [], start=1):
        try:
            rows.append(json.loads(line))
        except json.JSONDecodeError as error:
            raise RefusedError(
                f"{path}, line {number} must be JSON, got {line[:60]!r} ({error.msg}). Restore the "
                "file, or delete it and give the same command again."
            ) from None
    return rows


def read_utf8(path: Path) -> str:
    """Read a text file.

    Raises:
        RefusedError: The file is not UTF-8.
    """
    try:
        return path.read_text(encoding="utf-8")
    except UnicodeDecodeError as error:
        raise RefusedError(f"{path} must be UTF-8 ({error}). Convert it.", code="utf-8") from None


def file_sha256(path: Path) -> str:
    """Return the SHA-256 of a file's bytes."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def content_sha256(*parts: str | bytes) -> str:
    """Return the SHA-256 of parts with their lengths, so that "ab", "c" and "a", "bc" differ."""
    digest = hashlib.sha256()
    for part in parts:
        raw = part.encode() if isinstance(part, str) else part
        digest.update(len(raw).to_bytes(8, "little"))
        digest.update(raw)
    return digest.hexdigest()


def canonical_json(value: Any) -> str:
    """Return JSON that is equal for equal values: with sorted keys and without spaces."""
    return json_text(value, sort_keys=True, separators=(",", ":"))


def sync(path: Path) -> None:
    """Wait until a file's content, or the names in a folder, are on the disk."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def sync_folder(folder: Path) -> None:
    """Wait until everything in a folder is on the disk, so that no name lacks its content."""
    for path in sorted(folder.rglob("*"), reverse=True):  # contents before their folder
        if path.is_file():
            follow_umask(path)
        sync(path)
    sync(folder)


def publish(written: Path, place: Path) -> None:
    """Rename a finished folder to its final name, after everything in it is on the disk.

    Raises:
        OSError: Something could not be written; ``place`` is unchanged.
    """
    with name_disk_errors(place):
        sync_folder(written)
    if place.exists():  # damaged, or left by a run that was later resumed from an older checkpoint
        remove_folder(place)
    written.replace(place)
    sync(place.parent)


@contextmanager
def new_folder(place: Path) -> Iterator[Path]:
    """Yield a temporary folder that becomes ``place``, absent or empty, after the block."""
    place = place.resolve()  # a folder cannot replace a link
    if place == Path.cwd():
        raise RefusedError(f"out must be a new folder, got the current one, {place}. Name one.")
    with name_disk_errors(place):
        place.parent.mkdir(parents=True, exist_ok=True)
        # not named by process id: containers often share one, and a killed run leaves its folder
        temporary = Path(tempfile.mkdtemp(".tmp", f".{place.name}.", dir=place.parent))
        try:
            follow_umask(temporary)
            yield temporary
            sync_folder(temporary)
            temporary.replace(place)
        finally:
            shutil.rmtree(temporary, ignore_errors=True)
    sync(place.parent)


def remove_folder(place: Path) -> None:
    """Rename a folder and then remove it, so that a killed process leaves no partial folder."""
    doomed = place.with_name(REMOVING)
    shutil.rmtree(doomed, ignore_errors=True)
    place.replace(doomed)
    shutil.rmtree(doomed)


@contextmanager
def name_disk_errors(path: Path) -> Iterator[None]:
    """Put ``path`` into an error of the disk, which may name a temporary file, or none at all."""
    try:
        yield
    except OSError as error:
        is_temporary = re.search(r"(^|/)\.[^/]+\.tmp(/|$)", str(error.filename))
        if error.errno in UNWRITABLE or is_temporary:
            error.filename = str(path)
        raise
