"""Reading of datasets of all supported kinds."""

from __future__ import annotations

from collections.abc import Sequence
from itertools import islice
from pathlib import Path
from typing import Any

from realign.data.decisions import apply_decisions, decisions_path, read_decisions
from realign.data.formats.chat_pairs import OFFICIAL
from realign.data.formats.json_rows import is_json_list
from realign.data.formats.layout import Layout
from realign.data.formats.layouts import recognise
from realign.data.formats.official import read_official_rows
from realign.data.formats.pair_rows import PairParquet, read_pair_rows
from realign.data.formats.parquet import ParquetRecords, is_own, read_metadata, read_parquet
from realign.data.formats.read_source import LOOKED_AT, open_rows
from realign.data.image_names import check_image_root
from realign.data.missing_images import where_missing_images_are
from realign.data.problems import refuse_problems
from realign.data.records import Problem, Record
from realign.errors import RefusedError
from realign.runtime.progress import announce
from realign.runtime.strict_json import read_json


def read_records(data: Path, image_root: Path | None) -> Sequence[Record]:
    """Read a dataset: a parquet file, a folder made by ``realign build``, or JSON. Its rows have
    this project's layout, that of the authors, or any other layout with both answers.

    Args:
        data: The file or folder.
        image_root: Folder of the images that rows name; required for JSON.
    Raises:
        RefusedError: The path is not a dataset, JSON comes without an image folder, or rows are
            bad; the message counts the problems and shows the first ones of each kind.

    Example::

        >>> from pathlib import Path
        >>> from realign import read_records
        >>> records = read_records(Path("pairs.parquet"), None)
        >>> len(records), records[0].id
        (2, 'r0')
    """
    records, bad = read_rows(data, image_root)
    problems = [problem for row in bad for problem in row]
    num_rows = len(records) + len(bad)
    refuse_problems(problems, num_rows, where_missing_images_are(image_root, problems, num_rows))
    return records


def read_rows(data: Path, image_root: Path | None) -> tuple[Sequence[Record], list[list[Problem]]]:
    """Read a dataset as :func:`read_records` does. Return the good rows, and the problems of each
    bad row of JSON; bad rows of a parquet file are refused when they are read.

    Raises:
        RefusedError: The path is not a dataset, or JSON comes without an image folder.
    """
    file, root = dataset_file(data, image_root)
    if file.suffix == ".parquet":
        return _read_parquet(file, root), []
    assert root is not None
    first = _first_rows(file)
    if not any(isinstance(row, dict) for row in first):
        _check_rows(file)
    # a file without objects has no layout; the authors' reader explains what is wrong with its rows
    layout = _layout(first, file) if any(isinstance(row, dict) for row in first) else OFFICIAL
    # without retrieved images, rows of the authors' layout are plain pairs of answers
    if layout is OFFICIAL and not _is_without_retrieved(first):
        return read_official_rows(file, root)
    check_image_root(root)
    return read_pair_rows(open_rows(file), file.name, layout, root)


def _is_without_retrieved(rows: list[Any]) -> bool:
    """Return whether rows name images but no retrieved images."""
    keys = [row.keys() for row in rows if isinstance(row, dict)]
    return any("image" in row for row in keys) and not any("retrieved_image" in row for row in keys)


def _check_rows(file: Path) -> None:
    """Refuse a JSON file that is one value and neither a list nor lines."""
    if file.suffix == ".json" and not is_json_list(file):
        value = read_json(file)
        raise RefusedError(
            f"{file} must be a list of rows, or have one row per line, got {type(value).__name__}. "
            "Put the rows into []."
        )


def _read_parquet(file: Path, root: Path | None) -> ParquetRecords:
    if is_own(metadata := read_metadata(file)):
        return read_parquet(file, root)
    if not metadata.num_rows:
        return ParquetRecords(file, metadata, [], root)
    layout = _layout(_first_rows(file), file)
    return PairParquet(file, metadata, root, layout)


def _first_rows(file: Path) -> list[Any]:
    return [item.row for item in islice(open_rows(file), LOOKED_AT)]


def _layout(rows: list[Any], file: Path) -> Layout:
    layout = recognise(rows, None, file.name, option="data")
    if layout is not OFFICIAL:
        announce(f"data {file.name}: read as {layout.name} ({layout.summary})")
    return layout


def check_dataset(data: Path, image_root: Path | None) -> None:
    """Refuse a path that is not a dataset, before anything is read.

    Raises:
        RefusedError: The path is not a dataset, or JSON comes without an image folder.
    """
    _, root = dataset_file(data, image_root)
    if root is not None:
        check_image_root(root)


def dataset_file(data: Path, image_root: Path | None) -> tuple[Path, Path | None]:
    """Return the dataset's file and its image folder, which JSON always has.

    Raises:
        RefusedError: The path is not a dataset, or JSON comes without an image folder.
    """
    if data.is_dir():
        data = data / "dataset.parquet"
    if not data.is_file():
        raise RefusedError(
            f"data must be a dataset file or folder, got {data}, which does not exist. Check "
            "--data; a folder must be one that `realign build` has finished."
        )
    if data.suffix == ".parquet":
        return data, image_root
    if data.suffix in (".json", ".jsonl"):
        if image_root is None:
            raise RefusedError(
                f"images must name the image folder for {data.name}. Pass --images FOLDER."
            )
        return data, image_root
    raise RefusedError(
        f"data must end in .parquet, .json or .jsonl, got {data.name}. Rename it "
        "after its format, or convert it."
    )


def read_kept_records(data: Path, image_root: Path | None) -> Sequence[Record]:
    """Read a dataset without the rows that its decision file drops, and announce their number.

    Raises:
        RefusedError: What :func:`read_records` raises; the decision file is damaged, or drops
            every row.
    """
    return without_dropped(read_records(data, image_root), data)


def without_dropped(records: Sequence[Record], data: Path) -> Sequence[Record]:
    """Leave out the rows of ``data`` that its decision file drops, and announce their number.

    Raises:
        RefusedError: The decision file is damaged, or drops every row.
    """
    path = decisions_path(data)
    decisions = read_decisions(path)
    if not decisions:
        return records
    left, stale = apply_decisions(records, decisions)
    if stale:
        announce(
            f"{len(stale)} decision(s) of {path.name} not applied: the rows have changed since, "
            f"first: row {stale[0].id}. Decide again with `realign browse`"
        )
    if not left and len(records):
        raise RefusedError(
            f"{path} must keep at least one row of {data}, drops all {len(records)}. Decide again "
            "with `realign browse`, or remove the file."
        )
    if dropped := len(records) - len(left):
        announce(f"{dropped} of {len(records)} rows dropped by {path.name}")
    return left


def dataset_title(data: Path) -> str:
    """Return the title of a dataset; for a folder named ``dataset``, it includes the run's name."""
    folder = data.resolve() if data.is_dir() else data.resolve().parent
    if data.is_file() and data.name != "dataset.parquet":
        return data.name
    return f"{folder.parent.name}/{folder.name}" if folder.name == "dataset" else folder.name
