"""Files that are whole or absent: written beside their place, synced, then renamed. Also their
content hashes.
"""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from realign.errors import RefusedError


@contextmanager
def replacing(path: Path) -> Iterator[Path]:
    """Yield a temporary path that becomes ``path`` when the block ends, and disappears if it
    fails.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_name(f".{path.name}.{os.getpid()}.tmp")
    try:
        yield temporary
        follow_umask(temporary)
        with temporary.open("rb+") as file:
            os.fsync(file.fileno())
        temporary.replace(path)
    finally:
        temporary.unlink(missing_ok=True)
    directory = os.open(path.parent, os.O_RDONLY)
    try:
        os.fsync(directory)
    finally:
        os.close(directory)


def follow_umask(path: Path) -> None:
    """Give a file the permissions that ``open`` would have given it; safetensors writes 0600."""
    mask = os.umask(0o077)  # it can only be read by setting it
    os.umask(mask)
    path.chmod(0o666 & ~mask)


def write_text(path: Path, text: str) -> None:
    """Write ``text`` to ``path``, whole or not at all."""
    with replacing(path) as temporary:
        temporary.write_text(text, encoding="utf-8")


def write_json(path: Path, value: Any) -> None:
    """Write ``value`` as indented JSON, whole or not at all."""
    write_text(path, json.dumps(value, indent=2, ensure_ascii=False) + "\n")


def write_jsonl(path: Path, rows: Iterable[Any]) -> None:
    """Write one JSON value a line, whole or not at all."""
    write_text(path, "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows))


def read_jsonl(path: Path) -> list[Any]:
    """Read one JSON value a line.

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
                f"{path}, line {number} must be JSON, got {line[:60]!r} ({error.msg}). Correct it."
            ) from None
    return rows


def read_json(path: Path) -> Any:
    """Read a JSON file.

    Raises:
        RefusedError: It is not UTF-8 or not JSON.
    """
    try:
        return json.loads(read_utf8(path))
    except json.JSONDecodeError as error:
        raise RefusedError(
            f"{path}, line {error.lineno} must be JSON ({error.msg}). Correct it."
        ) from None


def read_utf8(path: Path) -> str:
    """Read a text file.

    Raises:
        RefusedError: It is not UTF-8.
    """
    try:
        return path.read_text(encoding="utf-8")
    except UnicodeDecodeError as error:
        raise RefusedError(f"{path} must be UTF-8 ({error}). Save it so.") from None


def file_sha256(path: Path) -> str:
    """SHA-256 of a file's bytes."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def content_sha256(*parts: str | bytes) -> str:
    """SHA-256 over length-framed parts, so that ("ab", "c") and ("a", "bc") differ."""
    digest = hashlib.sha256()
    for part in parts:
        raw = part.encode() if isinstance(part, str) else part
        digest.update(len(raw).to_bytes(8, "little"))
        digest.update(raw)
    return digest.hexdigest()


def canonical_json(value: Any) -> str:
    """JSON with one spelling a value: sorted keys, no spaces."""
    return json.dumps(value, sort_keys=True, separators=(",", ":"), ensure_ascii=False)
