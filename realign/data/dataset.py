"""Opening a dataset, whatever it is."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from realign.data.decisions import apply_decisions, decisions_path, read_decisions
from realign.data.formats.official import read_official_json, read_official_rows
from realign.data.formats.parquet import read_parquet
from realign.data.image_names import check_image_root
from realign.data.records import Problem, Record
from realign.errors import RefusedError
from realign.runtime.progress import announce


def read_records(data: Path, image_root: Path | None) -> Sequence[Record]:
    """Read a dataset by what it is: a parquet file, a folder made by ``realign build``, or the
    authors' JSON.

    Raises:
        RefusedError: The path is none of these, or JSON comes without an image folder.
    """
    file, root = dataset_file(data, image_root)
    return read_parquet(file) if root is None else read_official_json(file, root)


def read_rows(data: Path, image_root: Path | None) -> tuple[Sequence[Record], list[list[Problem]]]:
    """As :func:`read_records`, but bad rows of the authors' JSON are returned beside the good
    ones, each as its problems. Those of a parquet file are refused when they are read.

    Raises:
        RefusedError: The path is none of these, or JSON comes without an image folder.
    """
    file, root = dataset_file(data, image_root)
    return (read_parquet(file), []) if root is None else read_official_rows(file, root)


def check_dataset(data: Path, image_root: Path | None) -> None:
    """Refuse a path that is no dataset, before anything is read.

    Raises:
        RefusedError: The path is no dataset, or JSON comes without an image folder.
    """
    _, root = dataset_file(data, image_root)
    if root is not None:
        check_image_root(root)


def dataset_file(data: Path, image_root: Path | None) -> tuple[Path, Path | None]:
    """Return the dataset's file and, where it is JSON, its image folder.

    Raises:
        RefusedError: As :func:`read_records`.
    """
    if data.is_dir():
        data = data / "dataset.parquet"
    if not data.is_file():
        raise RefusedError(
            f"data must be a dataset file or folder, got {data}, which does not exist. Check "
            "--data; "
            "a folder must be one that `realign build` has finished."
        )
    if data.suffix == ".parquet":
        return data, None
    if data.suffix == ".json":
        if image_root is None:
            raise RefusedError(
                f"images must name the image folder for {data.name}. Pass --images FOLDER."
            )
        return data, image_root
    raise RefusedError(
        f"data must end in .parquet or .json, got {data.name}. Convert it to one of them."
    )


def read_kept_records(data: Path, image_root: Path | None) -> Sequence[Record]:
    """Read a dataset without the rows that its decision file drops, and say how many these are.

    Raises:
        RefusedError: What :func:`read_records` raises; the decision file is damaged, or drops
            every row.
    """
    return without_dropped(read_records(data, image_root), data)


def without_dropped(records: Sequence[Record], data: Path) -> Sequence[Record]:
    """Leave out the rows of ``data`` that its decision file drops, and say how many these are.

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
            f"{len(stale)} decision(s) of {path.name} not applied: the content changed since, "
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
    """What a page calls a dataset; a folder named ``dataset`` is called after its run too."""
    folder = data.resolve() if data.is_dir() else data.resolve().parent
    if data.is_file() and data.name != "dataset.parquet":
        return data.name
    return f"{folder.parent.name}/{folder.name}" if folder.name == "dataset" else folder.name
