"""Writers of files of rows, one row at a time."""

from __future__ import annotations

from collections.abc import Iterable
from pathlib import Path
from typing import Any

from realign.data.export.folder import ImageFolder
from realign.data.records import IMAGE_TOKEN, Message, Record
from realign.runtime.files import json_text


def write_list(path: Path, rows: Iterable[Any]) -> int:
    """Write a JSON list, one row per line; return the number of rows."""
    count = 0
    with path.open("w", encoding="utf-8") as file:
        for row in rows:
            file.write(("[\n" if not count else ",\n") + json_text(row))
            count += 1
        file.write("\n]\n" if count else "[]\n")
    return count


def write_lines(path: Path, rows: Iterable[Any]) -> int:
    """Write JSON lines; return the number of rows."""
    count = 0
    with path.open("w", encoding="utf-8") as file:
        for row in rows:
            file.write(json_text(row) + "\n")
            count += 1
    return count


def named(record: Record, images: ImageFolder, *, rejected: bool = False) -> list[str]:
    """Write a record's images; return their paths relative to the export."""
    files, key = (
        (record.rejected_images, "retrieved_image") if rejected else (record.images, "image")
    )
    original = record.source.get(key)
    # provenance holds the name of one image only
    name = original if isinstance(original, str) and len(files) == 1 else None
    return [f"images/{images.add(raw, name)}" for raw in files]


def with_placeholders(record: Record) -> list[Message]:
    """Return the prompt, with a placeholder for each image in front of its first user turn."""
    turns = [dict(turn) for turn in record.prompt]
    first = next((turn for turn in turns if turn["role"] == "user"), None)
    if first and record.images:
        first["content"] = IMAGE_TOKEN * len(record.images) + first["content"]
    return turns
