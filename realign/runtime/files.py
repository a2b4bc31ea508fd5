"""Files that are whole or absent: written beside their place, synced, then renamed. Also their
content hashes.
"""

from __future__ import annotations

import errno
import hashlib
import json
import math
import os
import re
import shutil
from collections import Counter
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, BinaryIO

from realign.errors import RefusedError

MAX_LINE_BYTES = 1 << 20
# half of a pair cannot be tokenized or written
_SURROGATE = re.compile(r"\\u[dD][89a-fA-F]")
REMOVING = ".removing"


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


def is_unfinished(path: Path) -> bool:
    """Whether a path is a temporary one of :func:`replacing`; a killed process leaves it behind."""
    return re.fullmatch(r"\..+\.\d+\.tmp", path.name) is not None and path.is_file()


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
    """Read one JSON value a line of a file that this project wrote; see :func:`iter_jsonl` for
    those of others.

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


def iter_jsonl(path: Path) -> Iterator[tuple[int, Any | RefusedError]]:
    """Read a JSON lines file that others wrote, a line at a time, and go on after a bad line.

    Strict, since what is guessed here is trained on: UTF-8 (with or without a byte order mark),
    at most ``MAX_LINE_BYTES`` a line, one value a line, no key twice in an object, no NaN or
    Infinity, no half of a surrogate pair.

    Yields:
        The line's number, from 1, and its value, or the refusal that names file and line. Codes:
        ``long-line``, ``utf-8``, ``empty-line``, ``json``, ``duplicate-key``, ``number``,
        ``surrogate``.
    """
    with path.open("rb") as file:
        number = 0
        while raw := file.readline(MAX_LINE_BYTES + 2):  # with its line end, as on Windows
            number += 1
            line = raw.removesuffix(b"\n").removesuffix(b"\r")
            where = f"{path.name}, line {number}"
            if len(line) > MAX_LINE_BYTES:
                length = len(raw) + (0 if raw.endswith(b"\n") else _skip_line(file))
                yield (
                    number,
                    RefusedError(
                        f"{where}: a line must have at most {MAX_LINE_BYTES} bytes, got {length}. "
                        "Shorten it; images are named, not embedded.",
                        code="long-line",
                    ),
                )
                continue
            try:
                yield number, _parse_strictly(line, where, is_first=number == 1)
            except RefusedError as error:
                yield number, error


def _skip_line(file: BinaryIO) -> int:
    """Read to the end of the line; return how many bytes that was."""
    skipped = 0
    while part := file.readline(MAX_LINE_BYTES):
        skipped += len(part)
        if part.endswith(b"\n"):
            break
    return skipped


def _parse_strictly(line: bytes, where: str, *, is_first: bool) -> Any:
    try:
        text = line.decode("utf-8-sig" if is_first else "utf-8")
    except UnicodeDecodeError as error:
        what = f"byte {line[error.start]:#04x} at position {error.start + 1} of the line"
        if is_first and line.startswith((b"\xff\xfe", b"\xfe\xff")):
            what = "the byte order mark of UTF-16"
        raise RefusedError(
            f"{where} must be UTF-8, got {what}. Save the file as UTF-8.", code="utf-8"
        ) from None
    if not text.strip():
        raise RefusedError(
            f"{where} must be JSON, got an empty line. Remove it.", code="empty-line"
        )
    return _strict_json(text, where)


class _NotStrict(ValueError):
    """What json accepts and this project does not: what it is, and its code."""


def _strict_json(text: str, where: str, *, has_lines: bool = False) -> Any:
    try:
        value = json.loads(
            text, object_pairs_hook=_unique, parse_float=_finite, parse_constant=_finite
        )
        if _SURROGATE.search(text):
            canonical_json(value).encode()
    except json.JSONDecodeError as error:
        place = f"{where}, line {error.lineno}" if has_lines else where
        near = text[max(0, error.pos - 20) : error.pos + 20]
        said = f"got {near!r} around column {error.colno} ({error.msg})"
        raise RefusedError(f"{place} must be JSON, {said}. Correct it.", code="json") from None
    except _NotStrict as error:
        what, code = error.args
        raise RefusedError(f"{where}: JSON must not have {what}. Correct it.", code=code) from None
    except UnicodeEncodeError as error:
        half = error.object[error.start]
        raise RefusedError(
            f"{where}: text must have surrogates in pairs, got {half!r} alone. Remove it.",
            code="surrogate",
        ) from None
    except (ValueError, RecursionError) as error:  # too many digits, too many brackets
        raise RefusedError(f"{where} must be JSON ({error}). Correct it.", code="json") from None
    return value


def _unique(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    value = dict(pairs)
    if len(value) < len(pairs):
        again = Counter(key for key, _ in pairs).most_common(1)[0][0]
        raise _NotStrict(f"a key twice in one object, got {again[:60]!r} again", "duplicate-key")
    return value


def _finite(number: str) -> float:
    if not math.isfinite(value := float(number)):
        raise _NotStrict(f"a number that is not finite, got {number[:60]}", "number")
    return value


def read_json(path: Path) -> Any:
    """Read a JSON file that others wrote, as strictly as :func:`iter_jsonl` a line.

    Raises:
        RefusedError: It is not UTF-8 or not JSON, or has a key twice in an object, or a number
            that is not finite.
    """
    return _strict_json(read_utf8(path).removeprefix("\ufeff"), str(path), has_lines=True)


def read_utf8(path: Path) -> str:
    """Read a text file.

    Raises:
        RefusedError: It is not UTF-8.
    """
    try:
        return path.read_text(encoding="utf-8")
    except UnicodeDecodeError as error:
        raise RefusedError(f"{path} must be UTF-8 ({error}). Save it so.", code="utf-8") from None


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


def publish(written: Path, place: Path) -> None:
    """Give a finished folder its name, once everything in it is on the disk.

    Raises:
        OSError: Something could not be written; ``place`` is as it was.
    """
    for path in sorted(written.rglob("*"), reverse=True):  # what is in a folder before the folder
        if path.is_file():
            follow_umask(path)
        _sync(path)
    _sync(written)
    if place.exists():  # damaged, or of a course that was left for an older checkpoint
        remove_folder(place)
    written.replace(place)
    _sync(place.parent)


def _sync(path: Path) -> None:
    """Have the disk hold what a file or a folder holds."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def remove_folder(place: Path) -> None:
    """Take the name from a checkpoint before its files: when this is killed, no half of one has
    it.
    """
    doomed = place.with_name(REMOVING)
    shutil.rmtree(doomed, ignore_errors=True)
    place.replace(doomed)
    shutil.rmtree(doomed)


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
