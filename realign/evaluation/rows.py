"""Read and check rows of benchmark files, and return their keys."""

from __future__ import annotations

import csv
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

from realign.errors import RefusedError
from realign.runtime.files import canonical_json, content_sha256
from realign.runtime.strict_json import iter_jsonl, read_json

Row = dict[str, Any]  # "image", "text", "where" (file and line), and keys of the benchmark


def read_records(path: Path) -> list[tuple[str, Any]]:
    """Read the values of a file that is one JSON list or holds one value on each line.

    Returns:
        records: The place of each value, as messages name it, and the value.
    Raises:
        RefusedError: The file is empty, not UTF-8, or neither a JSON list nor JSON lines.
    """
    if not path.is_file():
        raise RefusedError(f"{path} must be a file, got none. Put the file there.")
    with path.open("rb") as file:
        is_list = file.read(1024).removeprefix(b"\xef\xbb\xbf").lstrip().startswith(b"[")
    records = []
    if is_list:
        values = read_json(path)
        records = [(f"{path.name}, entry {i}", value) for i, value in enumerate(values, start=1)]
    else:
        for number, value in iter_jsonl(path):
            if isinstance(value, RefusedError):
                raise value
            records.append((f"{path.name}, line {number}", value))
    if not records:
        raise RefusedError(f"{path} must have at least one row, got none. Add some or remove it.")
    return records


def read_member(path: Path, key: str) -> list[Any]:
    """Read the list that a JSON object holds under a key.

    Raises:
        RefusedError: The file does not hold a JSON object with the key, or the list is empty.
    """
    content = read_json(path)
    values = content.get(key) if isinstance(content, dict) else None
    if not isinstance(values, list) or not values:
        raise RefusedError(
            f"{path} must be a JSON object whose {key} is a list that is not empty, got "
            f"{content!r:.80}. Take the published file."
        )
    return values


def read_table(path: Path) -> Iterator[tuple[str, dict[str, str]]]:
    """Read a table with a header, separated by tabs (``.tsv``) or commas (``.csv``).

    Rows are read one by one, since tables with images can be large.

    Yields:
        The place of each row, as messages name it, and its values by column.
    Raises:
        RefusedError: The table is not UTF-8 or has no row, a column occurs twice, a quotation mark
            is not closed, or a row has more or fewer values than the header.
    """
    csv.field_size_limit(1 << 30)
    dialect = "excel-tab" if path.suffix == ".tsv" else "excel"
    number = 0
    try:
        with path.open(encoding="utf-8-sig", newline="") as file:
            lines = csv.reader(file, dialect, strict=True)
            header = next(lines, [])
            if len(header) > len({*header}):
                raise RefusedError(f"{path} must have every column once, got {header}. Correct it.")
            for number, values in enumerate(lines, start=1):
                where = f"{path.name}, row {number}"
                if len(values) != len(header):
                    raise RefusedError(
                        f"{where} must have {len(header)} columns as the header has, got "
                        f"{len(values)}. Correct it."
                    )
                yield where, dict(zip(header, values, strict=True))
    except UnicodeDecodeError as error:
        raise RefusedError(f"{path} must be UTF-8 ({error}). Convert it.", code="utf-8") from None
    except csv.Error as error:
        raise RefusedError(
            f"{path.name}, row {number + 1} must be a row of a table, got one that is not "
            f"({error}). Correct its quotation marks."
        ) from None
    if not number:
        raise RefusedError(f"{path} must have at least one row, got none. Add some or remove it.")


def rows_digest(rows: Iterable[Mapping[str, Any]], *keys: str) -> str:
    """Return a digest of 16 hexadecimal digits over some keys of all rows, whatever their order."""
    lines = sorted(canonical_json([row[key] for key in keys]) for row in rows)
    return content_sha256(*lines)[:16]


def row_id(row: Mapping[str, Any]) -> str:
    """Return the key of a row within its benchmark: its id, or its image and text."""
    return str(row["id"]) if "id" in row else f"{row['image']}: {row['text']}"


def item_key(row: Mapping[str, Any]) -> tuple[str, str]:
    """Return the key of a row among all benchmarks: benchmark and id, or image and text if the row
    was not read by a benchmark.
    """
    key: tuple[str, str] = row.get("item") or (row["image"], row["text"])
    return key


class Key(NamedTuple):
    """The rule for one value of a row."""

    is_valid: Callable[[Any], bool]
    rule: str
    remedy: str


IMAGE = Key(
    lambda image: isinstance(image, str), "be a file name", "Name a file of the image folder."
)
TEXT = Key(
    lambda text: isinstance(text, str) and text.strip() != "",
    "be a non-empty string",
    "Fill it in.",
)


def read_rows(path: Path, **keys: Key) -> list[Row]:
    """Read a file of JSON lines or of one JSON list; rows have ``image``, ``text`` and ``keys``.

    Raises:
        RefusedError: As :func:`read_records`, or :func:`check_row` refuses a row.
    """
    keys = {"image": IMAGE, "text": TEXT, **keys}
    return [check_row(row, where, keys) for where, row in read_records(path)]


def check_row(row: Any, where: str, keys: Mapping[str, Key]) -> Row:
    """Return a row with the key ``where``, its place in the file.

    Raises:
        RefusedError: The row is not an object, lacks a key or has an invalid value.
    """
    if not isinstance(row, dict):
        raise RefusedError(
            f"{where} must be an object with {[*keys]}, got {row!r:.80}. Correct the line."
        )
    if missing := [name for name in keys if name not in row]:
        raise RefusedError(
            f"{where}: a row must have the keys {missing}, got {sorted(row)}. Add them."
        )
    for name, key in keys.items():
        if not key.is_valid(row[name]):
            raise RefusedError(
                f"{where}: {name} must {key.rule}, got {row[name]!r:.80}. {key.remedy}"
            )
    return {**row, "where": where}


def check_ids(tasks: Mapping[str, Sequence[Row]]) -> None:
    """Refuse rows of a benchmark that share an id: one question would count twice, and its answer
    could not be joined to it.

    Raises:
        RefusedError: Two rows have the same id.
    """
    places: dict[str, str] = {}
    for rows in tasks.values():
        for row in rows:
            if "id" not in row:
                continue
            if row["id"] in places:
                raise RefusedError(
                    f"{row['where']} must have an id of its own, got {row['id']}, which "
                    f"{places[row['id']]} has too. Take the published file."
                )
            places[row["id"]] = row["where"]
