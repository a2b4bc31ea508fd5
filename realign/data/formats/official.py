"""Preference records in the authors' published layout: a JSON list of ``{image, retrieved_image,
chosen, rejected}`` and one image folder.
"""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Iterable
from pathlib import Path
from typing import Any, cast

from realign.data.formats.file_records import FileRecords, FileRow
from realign.data.formats.json_rows import Found, is_json_list, read_lines
from realign.data.formats.layout import RefusedRowError
from realign.data.formats.row_reader import check_unicode
from realign.data.image_names import check_image_root, resolve_image
from realign.data.images import RefusedImage
from realign.data.records import (
    IMAGE_TOKEN,
    Message,
    Problem,
    Record,
    check_messages,
)
from realign.errors import RefusedError
from realign.runtime.files import canonical_json, json_text
from realign.runtime.strict_json import read_json

IMAGE_NAMES = ("image", "retrieved_image")


def read_official_rows(path: Path, image_root: Path) -> tuple[FileRecords, list[list[Problem]]]:
    """Read a file in the published layout, a JSON list or JSON lines. Return the good rows, and the
    problems of each bad one.

    Raises:
        RefusedError: The file is neither, or the image folder does not exist.
    """
    found: Iterable[Found]
    if is_json_list(path):
        rows = read_json(path)
        found = (Found(number, f"row {number}", row) for number, row in enumerate(rows, start=1))
    else:
        found = read_lines(path)
    check_image_root(image_root)
    read: list[FileRow] = []
    problems: list[list[Problem]] = []
    for item in found:
        number, row = item.number, item.row
        # the row's own id, or its number from 1, like the lines of a file
        has_id = isinstance(row, dict) and "id" in row
        row_id = str(row["id"] if has_id else number)
        where = f"{path.name}, row {row_id}" if has_id else item.place(path.name)
        try:
            if item.problem:
                raise item.problem.at(where)
            _check_unicode(row, where)
            result = _official_row(row, row_id, where, image_root)
        except RefusedError as error:
            problems.append([Problem.of(error, row_id, where)])
            continue
        if isinstance(result, FileRow):
            meta = {"file": path.name, "index": number - 1, **result.record.source}
            record = dataclasses.replace(result.record, meta={"source": meta})
            if not _spells(row, plain_row(record)):
                # unknown keys, the order of keys and the place of placeholders, for export
                record.source["row"] = json_text(row, ensure_ascii=True)
            read.append(dataclasses.replace(result, record=record))
        else:
            problems.append(result)
    return FileRecords(read), problems


def _check_unicode(row: Any, where: str) -> None:
    try:
        check_unicode(canonical_json(row), "the row")
    except RefusedRowError as error:
        raise error.at(where) from None


def _official_row(row: Any, row_id: str, where: str, image_root: Path) -> FileRow | list[Problem]:
    """Return the row, or the problems of its images; other problems are raised."""
    if not isinstance(row, dict):
        raise RefusedError(
            f"{where} must be an object, got {row!r:.80}. Correct it or remove it.",
            code="not-an-object",
        )
    if missing := [name for name in ("chosen", "rejected") if name not in row]:
        raise RefusedError(
            f"{where}: a row must have the keys {missing}, got {sorted(row)}. Add them.",
            code="missing-key",
            field=missing[0],
        )
    names = {name: row[name] for name in IMAGE_NAMES if name in row}
    if len(names) == 1:
        ((present, value),) = names.items()
        missing_name = "retrieved_image" if present == "image" else "image"
        raise RefusedError(
            f"{where}: {missing_name} is missing beside {present} {value!r}. Add it.",
            code="missing-key",
            field=missing_name,
        )
    for name, value in names.items():
        if not isinstance(value, str):
            raise RefusedError(
                f"{where}: {name} must be a file name, got {value!r:.80}. Name one of --images.",
                code="image-name",
                field=name,
            )
    _check_placeholders(row, len(names) // 2, where)
    prompt, chosen = split_conversation(row["chosen"], where, "chosen")
    rejected_prompt, rejected = split_conversation(row["rejected"], where, "rejected")
    if prompt != rejected_prompt:
        raise RefusedError(
            f"{where}: chosen and rejected must differ in the last answer only. Make their turns "
            "equal.",
            code="turns",
            field="rejected",
        )
    paths, problems = {}, []
    for name, file in names.items():
        try:
            paths[name] = resolve_image(image_root, file, where)
        except RefusedImage as error:
            problems.append(Problem(row_id, where, name, error.code, str(error), error.missing))
    if problems:
        return problems
    record = Record(
        id=row_id,
        images=(),
        prompt=prompt,
        chosen=chosen,
        rejected=rejected,
        meta={"source": names},
        place=where,
    )
    return FileRow(
        record,
        *(tuple(paths[key] for key in (name,) if key in paths) for name in IMAGE_NAMES),
    )


def plain_row(record: Record) -> dict[str, Any]:
    """Return a record in this layout: images by the names in its provenance, ``<image>`` on a line
    of its own before the first turn, and an id unless that is the row's number.
    """
    source = record.source
    names: dict[str, Any] = {name: source[name] for name in IMAGE_NAMES if name in source}
    index = source.get("index")
    first, *others = record.prompt
    content = f"{IMAGE_TOKEN}\n{first['content']}" if names else first["content"]
    prompt = [{**first, "content": content}, *others]
    is_number = isinstance(index, int) and record.id == str(index + 1)
    row_id: dict[str, Any] = {} if is_number else {"id": record.id}
    return {
        **row_id,
        **names,
        "chosen": [*prompt, {"role": "assistant", "content": record.chosen}],
        "rejected": [*prompt, {"role": "assistant", "content": record.rejected}],
    }


def _spells(row: Any, other: Any) -> bool:
    """Return whether two JSON values are equal, the order of keys included."""
    return json.dumps(row) == json.dumps(other)


def _check_placeholders(row: dict[str, Any], num_images: int, where: str) -> None:
    """Refuse a turn with a placeholder for which there is no image."""
    for name in ("chosen", "rejected"):
        turns = row[name] if isinstance(row[name], list) else []
        texts = [turn.get("content") for turn in turns[:-1] if isinstance(turn, dict)]
        count = sum(text.count(IMAGE_TOKEN) for text in texts if isinstance(text, str))
        if count > num_images:
            raise RefusedError(
                f"{where}: {name} must have at most one {IMAGE_TOKEN} per image, got {count} for "
                f"{num_images}. Name the images in image and retrieved_image, or remove "
                f"{IMAGE_TOKEN}.",
                code="image-slot",
                field=name,
            )


def split_conversation(turns: Any, where: str, name: str) -> tuple[tuple[Message, ...], str]:
    """Return the turns before the last answer, without image placeholders, and that answer.

    Raises:
        RefusedError: The turns are not a conversation of this layout.
    """
    check_messages(turns, where, name)
    roles = [turn.get("role") for turn in turns] if isinstance(turns, list) else []
    if not roles or roles != ["user", "assistant"] * (len(roles) // 2):
        raise RefusedError(
            f"{where}: {name} must alternate user and assistant turns, got {roles or turns!r}. "
            "Remove system turns and end with an answer.",
            code="turns",
            field=name,
        )
    if any(IMAGE_TOKEN in turn["content"] for turn in turns[1:-1]):
        raise RefusedError(
            f"{where}: {name} must have {IMAGE_TOKEN} in its first turn only. Move it there.",
            code="image-slot",
            field=name,
        )
    prompt = [{"role": turn["role"], "content": turn["content"]} for turn in turns[:-1]]
    prompt[0]["content"] = prompt[0]["content"].replace(IMAGE_TOKEN, "").strip()
    return tuple(prompt), cast("str", turns[-1]["content"])
