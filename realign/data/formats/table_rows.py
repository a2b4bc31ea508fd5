"""Readers of tables, one batch at a time: parquet files, folders of them, and folders saved by
``datasets``. Images are not decoded.
"""

from __future__ import annotations

import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from realign.data.formats.json_rows import Found
from realign.data.formats.layout import RefusedRowError
from realign.errors import RefusedError

BATCH_ROWS = 64  # with images of 100 kB, a batch takes 6 MB
SPLIT = re.compile(r"(train|test|validation|val|dev)\b", re.IGNORECASE)


def parquet_files(folder: Path) -> list[Path]:
    """Return the parquet files of a folder, in order of their names.

    Raises:
        RefusedError: There are no parquet files, or they belong to several splits.
    """
    files = sorted(folder.glob("*.parquet"))
    if not files:
        below = sorted({path.parent for path in folder.rglob("*.parquet")})
        names = ", ".join(str(path.relative_to(folder)) for path in below[:8])
        raise RefusedError(
            f"source must be a folder of parquet files or one that datasets has saved, got {folder}"
            f" with neither{f', but parquet files in {names}' if names else ''}. Name the folder "
            "that holds them."
        )
    splits = {match[1].lower() for file in files if (match := SPLIT.match(file.name))}
    if len(splits) > 1:
        raise RefusedError(
            f"source must be one split, got {sorted(splits)} in {folder}. Move the files of one "
            "into a folder of its own."
        )
    return files


def read_parquet_files(files: list[Path]) -> Iterator[Found]:
    """Yield the rows of parquet files, numbered over all files.

    Raises:
        RefusedError: A file is not parquet, or is damaged.
    """
    import pyarrow as pa
    import pyarrow.parquet as pq

    number = 0
    for path in files:
        try:
            with pq.ParquetFile(path) as file:
                for place, row in enumerate(_rows_of(file), start=1):
                    number += 1
                    where = f"row {place}" if len(files) == 1 else f"{path.name}, row {place}"
                    yield _found(number, where, row)
        except (pa.ArrowException, OSError) as error:
            raise RefusedError(
                f"{path} must be a whole parquet file ({error}). Download or build it again."
            ) from None


def _rows_of(file: Any) -> Iterator[dict[str, Any] | UnicodeDecodeError]:
    for group in range(file.num_row_groups):  # one at a time, or pyarrow buffers the whole file
        for batch in file.iter_batches(BATCH_ROWS, row_groups=[group]):
            yield from _rows(batch)


def read_saved(folder: Path) -> Iterator[Found]:
    """Yield the rows of a folder that ``Dataset.save_to_disk`` wrote.

    Raises:
        RefusedError: It holds several splits, or cannot be read.
    """
    import datasets
    import pyarrow as pa

    try:
        table = datasets.load_from_disk(str(folder))
    except (pa.ArrowException, OSError, ValueError, KeyError) as error:
        raise RefusedError(
            f"source {folder} must be a dataset that datasets has saved ({error}). Save it again."
        ) from None
    if isinstance(table, datasets.DatasetDict):
        raise RefusedError(
            f"source must be one split, got {sorted(table)} in {folder}. Give one of these folders."
        )
    number = 0
    for part in table.with_format("arrow").iter(BATCH_ROWS):
        for row in _rows(part):
            number += 1
            yield _found(number, f"row {number}", row)


def _rows(batch: Any) -> Iterator[dict[str, Any] | UnicodeDecodeError]:
    """Yield the rows of an Arrow table or batch; for a row with a text that is not UTF-8, yield the
    error.
    """
    try:
        yield from batch.to_pylist()
    except UnicodeDecodeError:
        for i in range(batch.num_rows):
            try:
                yield batch.slice(i, 1).to_pylist()[0]
            except UnicodeDecodeError as error:
                yield error


def _found(number: int, where: str, row: dict[str, Any] | UnicodeDecodeError) -> Found:
    if isinstance(row, UnicodeDecodeError):
        problem = RefusedRowError(
            "",
            "utf-8",
            f"texts must be UTF-8, got {row.object[row.start :][:8]!r}. Save them as UTF-8.",
        )
        return Found(number, where, problem=problem)
    return Found(number, where, row)
