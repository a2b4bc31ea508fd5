"""Facts of every row of a dataset, gathered in one pass and kept in a file of the run."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, NamedTuple

from realign.data.dataset import dataset_file
from realign.data.decisions import positions
from realign.data.images import Size
from realign.data.records import Record
from realign.errors import RefusedError
from realign.modeling.identity import Identity, version_of
from realign.runtime.files import (
    canonical_json,
    content_sha256,
    file_sha256,
    write_json,
)
from realign.runtime.strict_json import read_json

SCHEMA = 2
Sizes = tuple[Size | None, ...]


class RowFacts(NamedTuple):
    """Facts of a row that a run uses without reading the row again.

    Attributes:
        id: The row's id.
        key: :attr:`realign.data.records.Record.key`, the hash of its content.
        images: Width and height of each original image; None if the images were not decoded.
        rejected_images: The same for the retrieved images.
        tokens: Tokens of the row's longest sequence; 0 if it was not measured.
    """

    id: str
    key: str
    images: Sizes
    rejected_images: Sizes
    tokens: int = 0


@dataclass
class RowIndex:
    """The facts of all rows, in order.

    Attributes:
        rows: The facts.
        cells: Number of sequences per row that were checked and measured; 0 if none was.
        image_tokens: Number of images, by their number of tokens.
    """

    rows: list[RowFacts] = field(default_factory=list)
    cells: int = 0
    image_tokens: Counter[int] = field(default_factory=Counter)

    @classmethod
    def of(cls, records: Sequence[Record]) -> RowIndex:
        """Read every row once and hash it; nothing is checked or measured."""
        return cls(
            [
                RowFacts(
                    *(record.id, record.key),
                    *((None,) * len(record.images), (None,) * len(record.rejected_images)),
                )
                for record in records
            ]
        )

    @property
    def keys(self) -> list[str]:
        """Hashes of the rows' contents."""
        return [row.key for row in self.rows]

    @property
    def tokens(self) -> list[int]:
        """Tokens of each row's longest sequence."""
        return [row.tokens for row in self.rows]


class RowFile:
    """File that keeps a :class:`RowIndex` of checked rows, for when a run is resumed.

    It is valid only for the same bytes of the dataset, the same rows dropped by decisions, and the
    same model, template and processor. Rows whose images lie in a folder are always read and hashed
    again. Limits on lengths are not part of it.

    Args:
        path: The file.
        data: The dataset, as ``realign train`` takes it.
        image_root: Image folder of JSON.
        records: The rows of the dataset that are used.
        model: Identity of the model that scores them, with its processor.
    """

    def __init__(
        self,
        path: Path,
        data: Path,
        image_root: Path | None,
        records: Sequence[Record],
        model: Identity,
    ) -> None:
        file, image_folder = dataset_file(data, image_root)
        self._path, self._records = path, records
        self._has_image_folder = image_folder is not None
        self._stamp = content_sha256(
            *(str(SCHEMA), file_sha256(file), canonical_json(list(positions(records)))),
            *(canonical_json(model), version_of("jinja2")),
        )

    def restore(self) -> RowIndex:
        """Return the kept facts if the rows have not changed; otherwise facts of unchecked rows."""
        kept = self._read()
        if kept is not None and not self._has_image_folder:
            return kept
        found = RowIndex.of(self._records)
        return found if kept is None or kept.keys != found.keys else kept

    def keep(self, index: RowIndex) -> None:
        """Write the facts to the file."""
        content = {
            "schema": SCHEMA,
            "stamp": self._stamp,
            "cells": index.cells,
            "image_tokens": {str(key): index.image_tokens[key] for key in index.image_tokens},
            "rows": [list(row) for row in index.rows],
        }
        write_json(self._path, {**content, "sha256": content_sha256(canonical_json(content))})

    def _read(self) -> RowIndex | None:
        """Return the content of the file; None if it is damaged or belongs to other rows."""
        try:
            stored: dict[str, Any] = read_json(self._path)
            seal = stored.pop("sha256")
            is_whole = seal == content_sha256(canonical_json(stored))
            if not is_whole or stored["stamp"] != self._stamp:
                return None
            return RowIndex(
                [
                    RowFacts(row_id, key, _sizes(images), _sizes(rejected), tokens)
                    for row_id, key, images, rejected, tokens in stored["rows"]
                ],
                stored["cells"],
                Counter({int(tokens): n for tokens, n in stored["image_tokens"].items()}),
            )
        except (OSError, RefusedError, LookupError, TypeError, AttributeError, ValueError):
            return None


def _sizes(stored: Sequence[Sequence[int] | None]) -> Sizes:
    return tuple(None if size is None else (size[0], size[1]) for size in stored)
