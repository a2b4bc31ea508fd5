"""Preference records as parquet, written and read one row group at a time to limit the memory.

Columns are the ones that TRL's DPOTrainer reads (``images``, ``prompt``, ``chosen``, ``rejected``)
plus ``id``, ``rejected_images`` and ``meta``.
"""

from __future__ import annotations

import json
from bisect import bisect_right
from collections.abc import Iterable, Iterator, Sequence
from itertools import accumulate
from pathlib import Path
from typing import Any

from realign.data.formats.file_records import read_limited
from realign.data.image_names import is_url, resolve_image
from realign.data.records import COUNTED, LazyRecords, Record, check_messages
from realign.errors import RefusedError
from realign.runtime.files import canonical_json, finite_or_null, json_text, replacing

# Reading a row reads its whole group. Arrow's limit of 2 GiB per array is far above.
ROW_GROUP_BYTES = 16 << 20
REQUIRED = ("images", "prompt", "chosen", "rejected")
IMAGES = ("images", "rejected_images")
OPTIONAL = ("id", "rejected_images", "meta")
_TEXT = {"dtype": "string", "_type": "Value"}
_TURNS = {"feature": {"role": _TEXT, "content": _TEXT}, "_type": "List"}
_IMAGES = {"feature": {"_type": "Image"}, "_type": "List"}
# the description of the columns that `datasets` reads, so that it loads images as images
FEATURES = {
    "id": _TEXT,
    "images": _IMAGES,
    "prompt": _TURNS,
    "chosen": _TURNS,
    "rejected": _TURNS,
    "rejected_images": _IMAGES,
    "meta": _TEXT,
}


def write_parquet(
    records: Iterable[Record], path: Path, *, row_group_bytes: int = ROW_GROUP_BYTES
) -> None:
    """Write records as parquet with ``datasets`` image columns, whole or not at all.

    Equal records give equal bytes.

    Args:
        records: The records, read one at a time; it may be a generator.
        path: The file.
        row_group_bytes: Size of images and texts at which a row group ends, in bytes.

    Example::

        >>> from pathlib import Path
        >>> from realign import read_records, write_parquet
        >>> records = read_records(Path("pairs.parquet"), None)
        >>> write_parquet(records[1:], Path("fewer.parquet"))
        >>> [record.id for record in read_records(Path("fewer.parquet"), None)]
        ['r1']
    """
    import pyarrow as pa
    import pyarrow.parquet as pq

    text = pa.string()
    turns = pa.list_(pa.struct({"role": text, "content": text}))
    images = pa.list_(pa.struct({"bytes": pa.binary(), "path": text}))
    types = {
        name: text if feature is _TEXT else turns if feature is _TURNS else images
        for name, feature in FEATURES.items()
    }
    description = json_text({"info": {"features": FEATURES}})
    schema = pa.schema(types, {"huggingface": description})
    with replacing(path) as temporary, pq.ParquetWriter(temporary, schema) as writer:
        for group in _groups(records, row_group_bytes):
            writer.write_table(pa.Table.from_pylist([*map(_row, group)], schema=schema))


def _groups(records: Iterable[Record], row_group_bytes: int) -> Iterator[list[Record]]:
    group: list[Record] = []
    size = 0
    for record in records:
        group.append(record)
        texts = (record.chosen, record.rejected, *(turn["content"] for turn in record.prompt))
        size += sum(map(len, (*record.images, *record.rejected_images, *texts)))
        if size >= row_group_bytes:
            yield group
            group, size = [], 0
    if group:
        yield group


def _row(record: Record) -> dict[str, Any]:
    return {
        "id": record.id,
        "images": [{"bytes": raw, "path": None} for raw in record.images],
        "prompt": list(record.prompt),
        "chosen": [{"role": "assistant", "content": record.chosen}],
        "rejected": [{"role": "assistant", "content": record.rejected}],
        "rejected_images": [{"bytes": raw, "path": None} for raw in record.rejected_images],
        "meta": canonical_json(record.meta),
    }


def read_metadata(path: Path) -> Any:
    """Return the ``pyarrow.parquet.FileMetaData`` of a file.

    Raises:
        RefusedError: The file is not parquet, or cannot be read.
    """
    import pyarrow as pa
    import pyarrow.parquet as pq

    try:
        return pq.read_metadata(path)
    except (pa.ArrowInvalid, OSError) as error:
        raise RefusedError(
            f"{path} must be a parquet file ({error}). Correct its permissions, or build it with "
            "`realign build`."
        ) from None


def read_parquet(path: Path, image_root: Path | None = None) -> ParquetRecords:
    """Open the records of :func:`write_parquet`, or of any parquet file with the same columns.

    Args:
        path: The file.
        image_root: Folder of images that are named and not embedded.
    Raises:
        RefusedError: The file is not parquet or lacks a column. Rows are checked when they are
            read.
    """
    metadata = read_metadata(path)
    names = metadata.schema.to_arrow_schema().names
    if missing := [name for name in REQUIRED if name not in names]:
        raise RefusedError(
            f"{path} must have columns {list(REQUIRED)}, lacks {missing}. Build it with `realign "
            f"build`."
        )
    columns = [name for name in (*REQUIRED, *OPTIONAL) if name in names]
    return ParquetRecords(path, metadata, columns, image_root)


def is_own(metadata: Any) -> bool:
    """Return whether a file has the columns of :func:`write_parquet`, with strings as contents."""
    names = metadata.schema.to_arrow_schema().names
    leaves = [metadata.schema.column(i).path for i in range(metadata.num_columns)]
    return {*REQUIRED, "meta"} <= {*names} and all(
        any(leaf.startswith(f"{name}.") and leaf.endswith(".content") for leaf in leaves)
        for name in ("prompt", "chosen", "rejected")
    )


def parts_without_bytes(metadata: Any, columns: Sequence[str]) -> list[str]:
    """Return the columns to read, without the bytes of images that also have a path."""
    leaves = [metadata.schema.column(i).path for i in range(metadata.num_columns)]
    found = []
    for name in columns:
        parts = [leaf for leaf in leaves if leaf.partition(".")[0] == name]
        found += [part for part in parts if not part.endswith(".bytes")] or parts
    return found


class ParquetRecords(LazyRecords):
    """Records of a parquet file; the row group that was read last stays in memory.

    Args:
        path: The file. It is opened for each row group, so that the object can be sent to workers.
        metadata: Its ``pyarrow.parquet.FileMetaData``.
        columns: The columns to read.
        image_root: Folder of images that are named and not embedded.
    """

    def __init__(
        self, path: Path, metadata: Any, columns: list[str], image_root: Path | None
    ) -> None:
        self._path, self._metadata, self._columns = path, metadata, columns
        self._image_root = image_root
        groups = range(metadata.num_row_groups)
        sizes = [metadata.row_group(group).num_rows for group in groups]
        self._starts = [0, *accumulate(sizes)]
        self._group, self._table = -1, None

    def __len__(self) -> int:
        return self._starts[-1]

    def texts(self) -> ParquetRecords:
        """Return the same rows; the columns of images are not read."""
        columns = [name for name in self._columns if name not in IMAGES]
        return ParquetRecords(self._path, self._metadata, columns, self._image_root)

    def _row(self, index: int) -> dict[str, Any]:
        group = bisect_right(self._starts, index) - 1
        rows = self._read_group(group).slice(index - self._starts[group], 1).to_pylist()
        row: dict[str, Any] = rows[0]
        return row

    def _read(self, index: int) -> Record:
        row = self._row(index)
        row_id = str(row.get("id", index + 1))
        where = f"{self._path.name}, row {row_id}" + ("" if "id" in row else COUNTED)
        return Record(
            id=row_id,
            images=image_bytes(row.get("images"), self._image_root, where, "images"),
            prompt=check_messages(row["prompt"], where, "prompt"),
            chosen=_only_answer(row["chosen"], where, "chosen"),
            rejected=_only_answer(row["rejected"], where, "rejected"),
            rejected_images=image_bytes(
                row.get("rejected_images"), self._image_root, where, "rejected_images"
            ),
            meta=_meta(row.get("meta") or "{}", where),
            place=where,
        )

    def _read_group(self, group: int) -> Any:
        import pyarrow as pa
        import pyarrow.parquet as pq

        if group != self._group:
            try:
                with pq.ParquetFile(self._path, metadata=self._metadata) as file:
                    self._table = file.read_row_group(group, columns=self._columns)
            except (pa.ArrowException, OSError) as error:
                first, last = self._starts[group] + 1, self._starts[group + 1]
                raise RefusedError(
                    f"{self._path.name}: rows {first} to {last} are damaged ({error!s:.200}). "
                    "Copy or build the file again.",
                    code="damaged",
                ) from None
            self._group = group
        return self._table


def image_bytes(images: Any, image_root: Path | None, where: str, name: str) -> tuple[bytes, ...]:
    """Return the bytes of the images of a row, embedded or from the image folder.

    Raises:
        RefusedError: An image is neither embedded nor in the folder.
    """
    if not isinstance(images, list | None):
        images = [None]
    return tuple(_one_image(image, image_root, where, name) for image in images or [])


def _one_image(image: Any, image_root: Path | None, where: str, name: str) -> bytes:
    raw, path = (
        (image.get("bytes"), image.get("path")) if isinstance(image, dict) else (image, image)
    )
    if isinstance(raw, bytes):
        return raw
    if isinstance(path, str) and (image_root is not None or is_url(path)):
        return read_limited(resolve_image(image_root or Path(), path, f"{where}, {name}"))
    found, remedy = (
        ("a path", "Name their folder by --images, or embed")
        if isinstance(path, str)
        else (f"{image!r:.60}", "Embed")
    )
    raise RefusedError(
        f"{where}: {name} must be embedded as bytes, got {found}. {remedy} them when saving.",
        code="not-embedded",
        field=name,
    )


def _only_answer(turns: Any, where: str, name: str) -> str:
    (answer, *more) = check_messages(turns, where, name) or [{"role": "", "content": ""}]
    if more or answer["role"] != "assistant":
        raise RefusedError(
            f"{where}: {name} must be one assistant turn, got {[t['role'] for t in turns]}. "
            "Move other turns to prompt.",
            code="turns",
            field=name,
        )
    return answer["content"]


def _meta(text: Any, where: str) -> dict[str, Any]:
    try:
        meta = finite_or_null(json.loads(text))
    except (TypeError, ValueError, RecursionError):
        meta = None
    if not isinstance(meta, dict):
        raise RefusedError(
            f"{where}: meta must be a JSON object as text, got {text!r:.80}. Correct it or drop "
            "the column.",
            code="meta",
            field="meta",
        )
    return meta
