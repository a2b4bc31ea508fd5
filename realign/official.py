"""Preference records in the authors' published layout: a JSON list of ``{image, retrieved_image,
chosen, rejected}`` and one image folder.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, cast

from realign.errors import RefusedError
from realign.files import read_json
from realign.images import MAX_BYTES, check_image_root, resolve_image
from realign.records import (
    COUNTED,
    IMAGE_TOKEN,
    LazyRecords,
    Message,
    Record,
    check_messages,
    refuse_problems,
)


def read_official_json(path: Path, image_root: Path) -> OfficialRecords:
    """Open the published layout: a list of ``{image, retrieved_image, chosen, rejected}`` and one
    image folder.

    Raises:
        RefusedError: The file or rows do not have that layout, or images are missing; all are
            counted and the first twenty named.
    """
    rows = read_json(path)
    if not isinstance(rows, list):
        raise RefusedError(
            f"{path} must be a list of rows, got {type(rows).__name__}. Put the rows into []."
        )
    check_image_root(image_root)
    read: list[OfficialRow] = []
    problems: list[str] = []
    for number, row in enumerate(rows, start=1):
        try:
            read.append(_official_row(row, number, path, image_root))
        except RefusedError as error:
            problems += str(error).splitlines()
    refuse_problems(problems, len(rows))
    return OfficialRecords(read)


@dataclass(frozen=True)
class OfficialRow:
    """One checked row: a record without its images, and where these are."""

    record: Record
    image: Path | None
    retrieved_image: Path | None


class OfficialRecords(LazyRecords):
    """Rows whose image files are read when a row is."""

    def __init__(self, rows: Sequence[OfficialRow]) -> None:
        self._rows = rows

    def __len__(self) -> int:
        return len(self._rows)

    def texts(self) -> Sequence[Record]:
        """The same rows; no image file is read."""
        return [row.record for row in self._rows]

    def _read(self, index: int) -> Record:
        row = self._rows[index]
        return dataclasses.replace(
            row.record,
            images=_read_limited(row.image),
            rejected_images=_read_limited(row.retrieved_image),
        )


def _read_limited(path: Path | None) -> tuple[bytes, ...]:
    if path is None:
        return ()
    with path.open("rb") as file:
        return (file.read(MAX_BYTES + 1),)


def _official_row(row: Any, number: int, path: Path, image_root: Path) -> OfficialRow:
    # its own name where it has one; else its number, from 1 as the lines of a file
    has_id = isinstance(row, dict) and "id" in row
    row_id = str(row["id"] if has_id else number)
    where = f"{path.name}, row {row_id}" + ("" if has_id else COUNTED)
    if not isinstance(row, dict):
        raise RefusedError(f"{where} must be an object, got {row!r:.80}. Correct it or remove it.")
    if missing := [name for name in ("chosen", "rejected") if name not in row]:
        raise RefusedError(f"{where}: keys {missing} are missing, found {sorted(row)}. Add them.")
    names = {name: row[name] for name in ("image", "retrieved_image") if name in row}
    if len(names) == 1:
        ((there, value),) = names.items()
        missing_name = "retrieved_image" if there == "image" else "image"
        raise RefusedError(f"{where}: {missing_name} is missing beside {there} {value!r}. Add it.")
    for name, value in names.items():
        if not isinstance(value, str):
            raise RefusedError(
                f"{where}: {name} must be a file name, got {value!r:.80}. Name one of --images."
            )
    _check_placeholders(row, len(names) // 2, where)
    prompt, chosen = _split_conversation(row["chosen"], where, "chosen")
    rejected_prompt, rejected = _split_conversation(row["rejected"], where, "rejected")
    if prompt != rejected_prompt:
        raise RefusedError(
            f"{where}: chosen and rejected must differ in the last answer only. Make their turns "
            f"equal."
        )
    record = Record(
        id=row_id,
        images=(),
        prompt=prompt,
        chosen=chosen,
        rejected=rejected,
        meta={"source": {"file": path.name, "index": number - 1, **names}},
        place=where,
    )
    paths, problems = {}, []
    for name, file in names.items():
        try:
            paths[name] = resolve_image(image_root, file, where)
        except RefusedError as error:
            problems.append(str(error))
    if problems:
        raise RefusedError("\n".join(problems))
    return OfficialRow(record, paths.get("image"), paths.get("retrieved_image"))


def _check_placeholders(row: dict[str, Any], num_images: int, where: str) -> None:
    """A turn that speaks of an image which is not there would be trained on without it."""
    for name in ("chosen", "rejected"):
        turns = row[name] if isinstance(row[name], list) else []
        texts = [turn.get("content") for turn in turns[:-1] if isinstance(turn, dict)]
        count = sum(text.count(IMAGE_TOKEN) for text in texts if isinstance(text, str))
        if count > num_images:
            raise RefusedError(
                f"{where}: {name} must have at most one {IMAGE_TOKEN} an image, got {count} for "
                f"{num_images}. Name the images in image and retrieved_image, or remove "
                f"{IMAGE_TOKEN}."
            )


def _split_conversation(turns: Any, where: str, name: str) -> tuple[tuple[Message, ...], str]:
    """The turns before the last answer, without image placeholders, and that answer."""
    check_messages(turns, where, name)
    roles = [turn.get("role") for turn in turns] if isinstance(turns, list) else []
    if not roles or roles != ["user", "assistant"] * (len(roles) // 2):
        raise RefusedError(
            f"{where}: {name} must alternate user and assistant turns, got {roles or turns!r}. "
            "Remove system turns and end with an answer."
        )
    if any(IMAGE_TOKEN in turn["content"] for turn in turns[1:-1]):
        raise RefusedError(
            f"{where}: {name} must have {IMAGE_TOKEN} in its first turn only. Move it there."
        )
    prompt = [{"role": turn["role"], "content": turn["content"]} for turn in turns[:-1]]
    prompt[0]["content"] = prompt[0]["content"].replace(IMAGE_TOKEN, "").strip()
    return tuple(prompt), cast("str", turns[-1]["content"])
