"""Opening a dataset, whatever it is."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from realign.errors import RefusedError
from realign.official import read_official_json
from realign.parquet import read_parquet
from realign.records import Record


def read_records(data: Path, image_root: Path | None) -> Sequence[Record]:
    """Read a dataset by what it is: a parquet file, a folder made by ``realign build``, or the
    authors' JSON.

    Raises:
        RefusedError: The path is none of these, or JSON comes without an image folder.
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
        return read_parquet(data)
    if data.suffix == ".json":
        if image_root is None:
            raise RefusedError(
                f"images must name the image folder for {data.name}. Pass --images FOLDER."
            )
        return read_official_json(data, image_root)
    raise RefusedError(
        f"data must end in .parquet or .json, got {data.name}. Convert it to one of them."
    )
