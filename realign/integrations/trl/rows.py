"""Rows of a dataset in TRL's columns, as records for the collator and a reference cache."""

from __future__ import annotations

import copy
import dataclasses
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import datasets
from torch import Tensor

from realign.data.formats.chat_pairs import TRL
from realign.data.formats.file_records import read_limited
from realign.data.formats.layout import RefusedRowError, lone_image_pair
from realign.data.formats.pair_rows import read_pair
from realign.data.image_names import is_url
from realign.data.records import COUNTED, Record, content_problems
from realign.errors import RefusedError
from realign.modeling.collate import PreferenceCollator
from realign.runtime.progress import Progress

IMAGE_COLUMNS = ("image", "images", "rejected_images")
# columns that TRL's collator passes to the chat template, and a record does not hold
TEMPLATE_COLUMNS = ("tools", "chat_template_kwargs")
LACKING = "Run `realign cache` for this dataset, and read_cache for its rows."


def with_image_bytes(dataset: Any) -> Any:
    """Return a dataset, or a dictionary of datasets, whose image columns yield the bytes of the
    files instead of decoded images: the keys of a reference are computed from these bytes.
    """
    if isinstance(dataset, dict):
        return type(dataset)({name: with_image_bytes(part) for name, part in dataset.items()})
    features = getattr(dataset, "features", None) or {}
    undecoded = {name: _undecoded(features[name]) for name in IMAGE_COLUMNS if name in features}
    if isinstance(dataset, datasets.Dataset):
        # cast_column would rewrite all rows for a list of images, although they are stored alike
        dataset = copy.deepcopy(dataset)  # copies no table
        dataset.info.features.update(undecoded)
        return dataset
    for name, feature in undecoded.items():
        dataset = dataset.cast_column(name, feature)
    return dataset


def _undecoded(feature: Any) -> Any:
    if isinstance(feature, datasets.Image):
        return datasets.Image(decode=False)
    if isinstance(getattr(feature, "feature", None), datasets.Image):  # a list of images
        return datasets.List(datasets.Image(decode=False))
    return feature


def as_record(row: Mapping[str, Any], place: str = "") -> Record:
    """Return a row in TRL's columns as a record.

    Args:
        row: A row with ``prompt``, ``chosen``, ``rejected``, ``images`` or ``image``, and
            ``rejected_images``; its images undecoded.
        place: Name of the row in messages; taken from its id or prompt if it is empty.
    Raises:
        RefusedError: The row lacks a column, or has a value that a record cannot hold.
    """
    row_id = str(row.get("id") or "")
    place = place or (f"row {row_id}" if row_id else f"row with prompt {row.get('prompt')!r:.80}")
    for name in TEMPLATE_COLUMNS:
        if row.get(name):
            raise RefusedError(
                f"{place}: {name} must be empty, got {row[name]!r:.80}. Pass data_path='native', "
                "where TRL's collator hands it to the chat template."
            )
    try:
        pair = read_pair(dict(row), TRL)
        if pair.is_image_pair:
            raise lone_image_pair()
    except RefusedRowError as error:
        raise error.at(place) from None
    record = dataclasses.replace(
        pair.record(row_id, place, {}),
        images=_bytes_of(pair.images, f"{place}, images"),
        rejected_images=_bytes_of(pair.retrieved, f"{place}, rejected_images"),
    )
    for problem in content_problems(record, ()):
        raise RefusedError(problem.message, code=problem.code, field=problem.field)
    return record


def _bytes_of(images: Sequence[Any], where: str) -> tuple[bytes, ...]:
    """Return the bytes of images that the dataset embeds, or names on this machine."""
    files = []
    for image in images:
        raw, path = (
            (image.get("bytes"), image.get("path")) if isinstance(image, Mapping) else (image, None)
        )
        if isinstance(raw, bytes):
            files.append(raw)
        elif isinstance(path, str) and not is_url(path) and Path(path).is_file():
            files.append(read_limited(Path(path)))
        else:
            got = repr(path) if isinstance(path, str) else type(image).__name__
            raise RefusedError(
                f"{where} must be files of images, embedded or on this machine, got {got:.80}. "
                "Cast the column to datasets.Image(), or a list of it, before you pass the dataset."
            )
    return tuple(files)


class RowCollator:
    """:class:`realign.modeling.collate.PreferenceCollator` for rows in TRL's columns.

    Args:
        processor: The model's processor.
        num_cells: Number of cells of a pair that the objective reads.
        reference: Cached log-probabilities by ``record.key``; None leaves them out.
        shared_prefix: Whether the answers of a pair share their images and prompt.
    """

    def __init__(
        self,
        processor: Any,
        num_cells: int,
        reference: Mapping[str, Tensor] | None,
        *,
        shared_prefix: bool,
    ) -> None:
        self.reference = reference
        self._collate = PreferenceCollator(
            processor,
            num_cells,
            reference,
            shared_prefix=shared_prefix,
            # a cache knows what its values were computed from; a plain mapping does not
            watch=getattr(reference, "check_inputs", None),
        )

    def __call__(self, rows: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
        """Return a batch of the rows.

        Raises:
            RefusedError: A row cannot be read, or the reference lacks it.
        """
        records = [as_record(row) for row in rows]
        for record in records:
            if self.reference is not None and record.key not in self.reference:
                raise RefusedError(
                    f"reference must have every row, lacks {record.where}. {LACKING}"
                )
        return self._collate(records)


def check_rows(
    dataset: Any, name: str, reference: Mapping[str, Tensor] | None, num_cells: int
) -> None:
    """Refuse a dataset with a row that cannot be read or is not in the reference. Rows of a stream
    are refused when they are read.

    Args:
        dataset: From :func:`with_image_bytes`, or a dictionary of such datasets.
        name: Name of the argument.
        reference: Cached log-probabilities by ``record.key``, or None.
        num_cells: Number of log-probabilities that are read per row.
    Raises:
        RefusedError: The message names the first row and the number of missing ones.
    """
    if isinstance(dataset, dict):
        for key, part in dataset.items():
            check_rows(part, f"{name}[{key!r}]", reference, num_cells)
    if not isinstance(dataset, datasets.Dataset):
        return
    lacking: list[str] = []
    with Progress(f"check {name}", len(dataset)) as progress:
        for index, row in enumerate(dataset, start=1):
            place = f"{name}, row {index}{COUNTED}"
            record = as_record(row, place)
            if reference is not None:
                if record.key not in reference:
                    lacking.append(place)
                else:
                    _check_values(reference[record.key], num_cells, place)
            progress.advance()
    if lacking:
        raise RefusedError(
            f"reference must have every row, lacks {len(lacking)} of {len(dataset)}, first: "
            f"{lacking[0]}. {LACKING}"
        )


def _check_values(values: Any, num_cells: int, place: str) -> None:
    if not isinstance(values, Tensor):
        raise RefusedError(
            f"reference must map record.key to a tensor of log-probabilities, got "
            f"{type(values).__name__} for {place}. Call torch.tensor."
        )
    if values.ndim != 1 or len(values) < num_cells:
        raise RefusedError(
            f"reference must have {num_cells} values per row, got shape {tuple(values.shape)} for "
            f"{place}. Run `realign cache` with as many --cells."
        )
