"""Rows of any layout as pairs to train on, with their retrieved images if they have some."""

from __future__ import annotations

import dataclasses
from collections import defaultdict, deque
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from realign.data.formats.file_records import FileRecords, FileRow
from realign.data.formats.json_rows import Found
from realign.data.formats.layout import (
    Draft,
    Layout,
    RawRow,
    RefusedRowError,
    is_image_pair,
    lone_image_pair,
    retrieved_of,
)
from realign.data.formats.layouts import FORMATS
from realign.data.formats.parquet import ParquetRecords, image_bytes, parts_without_bytes
from realign.data.formats.row_reader import UniqueIds, check_unicode, id_of, object_of
from realign.data.image_names import resolve_image
from realign.data.images import RefusedImage
from realign.data.records import Problem, Record


@dataclass(frozen=True)
class Pair:
    """One row in the common form; its images are names or bytes, as in the row."""

    draft: Draft
    images: list[Any]
    retrieved: list[Any]
    is_image_pair: bool

    def record(self, row_id: str, place: str, source: dict[str, Any]) -> Record:
        """Return the record, without its images."""
        names = {"image": self.images, "retrieved_image": self.retrieved}
        for key, images in names.items():
            if len(images) == 1 and isinstance(name := _name(images[0]), str):
                source = {**source, key: name}
        draft = self.draft
        return Record(
            row_id,
            (),
            draft.prompt,
            draft.answer,
            draft.rejected,
            meta={"source": source},
            place=place,
        )


def read_pair(raw: RawRow, layout: Layout) -> Pair:
    """Return one row as a pair, its texts unchanged.

    Raises:
        RefusedRowError: The row does not have the layout, or has neither a rejected answer nor a
            retrieved image.
    """
    images, retrieved = layout.images(raw), retrieved_of(raw)
    (draft,) = layout.drafts(raw, "last", len(images))
    for turn in draft.prompt:
        check_unicode(turn["content"], "prompt")
    check_unicode(draft.answer, "chosen")
    check_unicode(draft.rejected, "rejected")
    pair = Pair(draft, images, retrieved, is_image_pair(draft, raw))
    if not draft.rejected.strip() and not pair.is_image_pair:
        raise RefusedRowError(
            "rejected",
            "empty",
            "rejected must not be empty, got a row without a rejected answer. Let `realign build` "
            "make it, or remove the row.",
        )
    return pair


def read_pair_rows(
    found: Iterable[Found], file: str, layout: Layout, image_root: Path
) -> tuple[FileRecords, list[list[Problem]]]:
    """Read JSON rows of a layout; return the good ones, and the problems of each bad one.

    An image pair in a separate row is joined to the row of the same images and messages that has
    the answer pair.
    """
    rows: list[FileRow] = []
    halves: list[FileRow] = []
    problems: list[list[Problem]] = []
    for item in found:
        place = item.place(file)
        row_id = str(item.number)
        try:
            raw = object_of(item)
            row_id = id_of(raw, item.number)
            pair = read_pair(raw, layout)
            source = {"file": file, "index": item.number - 1, "format": layout.name}
            row = FileRow(
                pair.record(row_id, place, source | ({"id": raw["id"]} if "id" in raw else {})),
                tuple(_resolve(image_root, image, f"{place}, images") for image in pair.images),
                tuple(
                    _resolve(image_root, image, f"{place}, rejected_images")
                    for image in pair.retrieved
                ),
            )
            (halves if pair.is_image_pair else rows).append(row)
        except RefusedImage as error:
            problems.append([Problem.of(error, row_id, place)])
        except RefusedRowError as error:
            problems.append([Problem.of(error.at(place), row_id, place)])
    for row in _join(rows, halves):
        alone = lone_image_pair().at(row.record.place)
        problems.append([Problem.of(alone, row.record.id, row.record.place)])
    if layout.ids_repeat:  # as in conversations about the same image
        ids = UniqueIds()
        rows = [
            dataclasses.replace(
                row, record=dataclasses.replace(row.record, id=ids.add(row.record.id))
            )
            for row in rows
        ]
    return FileRecords(rows), problems


def _resolve(root: Path, image: Any, where: str) -> Path:
    return resolve_image(root, _name(image), where)


def _name(image: Any) -> Any:
    return image.get("path") if isinstance(image, Mapping) else image


def _join(rows: list[FileRow], halves: list[FileRow]) -> list[FileRow]:
    """Give the retrieved images of image pairs to their answer pairs, first to those with the same
    id. Return the image pairs without an answer pair.
    """
    for has_id in (True, False):
        free: dict[Any, deque[int]] = defaultdict(deque)
        for i, row in enumerate(rows):
            if not row.rejected_images:
                free[_shared(row, has_id)].append(i)
        left = []
        for half in halves:
            if places := free[_shared(half, has_id)]:
                i = places.popleft()
                rows[i] = dataclasses.replace(
                    rows[i],
                    record=_with_retrieved_name(rows[i].record, half.record),
                    rejected_images=half.rejected_images,
                )
            else:
                left.append(half)
        halves = left
    return halves


def _shared(row: FileRow, has_id: bool) -> tuple[Any, ...]:
    """Return the values that an answer pair and its image pair have in common."""
    record = row.record
    turns = tuple((turn["role"], turn["content"]) for turn in record.prompt)
    return record.source.get("id") if has_id else None, row.images, turns, record.chosen


def _with_retrieved_name(record: Record, half: Record) -> Record:
    names = {name: half.source[name] for name in ("retrieved_image",) if name in half.source}
    return dataclasses.replace(record, meta={"source": {**record.source, **names}})


class PairParquet(ParquetRecords):
    """Rows of a parquet file of any layout.

    Args:
        layout: Layout of its rows.
        is_whole: Whether images are read too.
    """

    def __init__(
        self,
        path: Path,
        metadata: Any,
        image_root: Path | None,
        layout: Layout,
        *,
        is_whole: bool = True,
    ) -> None:
        keys = layout.keys | {"rejected_images", "retrieved_image"}
        columns = [name for name in metadata.schema.to_arrow_schema().names if name in keys]
        columns = columns if is_whole else parts_without_bytes(metadata, columns)
        super().__init__(path, metadata, columns, image_root)
        # by name, because the object is pickled for worker processes and layouts hold functions
        self._format, self._is_whole = layout.name, is_whole

    def texts(self) -> PairParquet:
        """Return the same rows; the bytes of images are not read."""
        parts = (self._path, self._metadata, self._image_root, FORMATS[self._format])
        return PairParquet(*parts, is_whole=False)

    def _read(self, index: int) -> Record:
        row = self._row(index)
        place = Found(index + 1, f"row {index + 1}").place(self._path.name)
        try:
            row_id = id_of(row, index + 1)
            if row.get("id") is not None:
                place = f"{self._path.name}, row {row_id}"
            pair = read_pair(row, FORMATS[self._format])
            if pair.is_image_pair:
                raise lone_image_pair()
        except RefusedRowError as error:
            raise error.at(place) from None
        source = {"file": self._path.name, "index": index, "format": self._format}
        record = pair.record(row_id, place, source)
        if not self._is_whole:
            return record
        root = self._image_root
        return dataclasses.replace(
            record,
            images=image_bytes(pair.images, root, place, "images"),
            rejected_images=image_bytes(pair.retrieved, root, place, "rejected_images"),
        )
