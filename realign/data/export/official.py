"""Export to the authors' published layout, which their code and ``realign train`` read."""

from __future__ import annotations

import dataclasses
import json
from collections import Counter
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any

from realign.data.export.folder import ImageFolder
from realign.data.export.rows import write_list
from realign.data.formats.official import plain_row, split_conversation
from realign.data.problems import refuse_problems
from realign.data.records import Problem, Record
from realign.errors import RefusedError

FILE = "pref_data.json"
NOTE = "train with --data pref_data.json --images images; the authors' code reads the same files"


def write_official(records: Iterable[Record], folder: Path) -> Counter[str]:
    """Write ``pref_data.json`` and ``images/`` into ``folder``; return counts.

    Raises:
        RefusedError: A row that the layout cannot hold: an image without a retrieved one, several
            images, or turns other than user and assistant in alternation.
    """
    images = ImageFolder(folder / "images")
    counts: Counter[str] = Counter()
    problems: list[Problem] = []

    def rows() -> Iterator[dict[str, Any]]:
        for record in records:
            counts["rows read"] += 1
            try:
                _check(record)
            except RefusedError as error:
                problems.append(Problem.of(error, record.id, record.where))
                continue
            counts["rows without an image"] += not record.images
            yield _row(record, images)

    counts["rows written"] = write_list(folder / FILE, rows())
    refuse_problems(problems, counts["rows read"])
    counts["images written"] = len(images)
    counts["images renamed"] = images.renamed
    return counts


def _check(record: Record) -> None:
    found = (len(record.images), len(record.rejected_images))
    if found not in ((0, 0), (1, 1)):
        raise RefusedError(
            f"{record.where}: the official layout requires one image and one retrieved image, or "
            f"none, got {found[0]} and {found[1]}. Build retrieved images, or export to ms-swift "
            "or llamafactory."
        )
    if not record.prompt:
        raise RefusedError(f"{record.where}: prompt must not be empty. Add a question.")
    row = plain_row(record)
    for name in ("chosen", "rejected"):
        split_conversation(row[name], record.where, name)


def _row(record: Record, images: ImageFolder) -> dict[str, Any]:
    names = {}
    for name, raw in (("image", record.images), ("retrieved_image", record.rejected_images)):
        if raw:
            original = record.source.get(name)
            names[name] = images.add(raw[0], original if isinstance(original, str) else None)
    plain = plain_row(_named(record, names))
    row = _as_read(record)
    if row is None:
        return plain
    texts = (record.prompt, record.chosen, record.rejected)
    is_edited = ("image" in row) != bool(names) or _texts_of(row) != texts
    row = {k: v for k, v in row.items() if names or k not in ("image", "retrieved_image")} | names
    return row | {name: plain[name] for name in ("chosen", "rejected") if is_edited}


def _as_read(record: Record) -> dict[str, Any] | None:
    """Return the row that the record was read from, if its provenance holds one in this layout."""
    try:
        row = json.loads(record.source.get("row", ""))
        _texts_of(row)
    except (ValueError, TypeError, KeyError):
        return None
    return row


def _named(record: Record, names: dict[str, str]) -> Record:
    """Return the record with the given names of its images in its provenance."""
    others = {k: v for k, v in record.source.items() if k not in ("image", "retrieved_image")}
    return dataclasses.replace(record, meta={**record.meta, "source": {**others, **names}})


def _texts_of(row: dict[str, Any]) -> Any:
    """Return the prompt and the answers of a row."""
    prompt, chosen = split_conversation(row["chosen"], "", "chosen")
    return prompt, chosen, split_conversation(row["rejected"], "", "rejected")[1]
