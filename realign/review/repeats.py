"""Find rows that repeat another row, their own original image, or an evaluation image."""

from __future__ import annotations

from collections.abc import Iterator
from itertools import count
from pathlib import Path

import numpy as np

from realign.data.image_names import check_image_root
from realign.data.image_pool import DecodedRow, inspect_images
from realign.data.images import ImageFacts, RefusedImage
from realign.data.perceptual_hash import NEAR_BITS, hamming
from realign.data.records import Problem, Record
from realign.errors import RefusedError

_SUFFIXES = {".jpg", ".jpeg", ".jpe", ".jfif", ".mpo", ".png", ".webp"}


class Repeats:
    """Finds repeated ids and rows. Codes: ``duplicate-id``, ``duplicate-row``."""

    def __init__(self) -> None:
        self._ids: dict[str, int] = {}
        self._keys: dict[str, int] = {}
        self._numbers = count(1)

    def problems(self, record: Record) -> Iterator[Problem]:
        """Yield the problems of the next row."""
        number, where = next(self._numbers), record.where
        if (first := self._ids.setdefault(record.id, number)) != number:
            message = f"{where}: id must be unique, got {record.id!r} again, first in row {first}. "
            yield Problem(record.id, where, "id", "duplicate-id", message + "Rename one.")
        if (first := self._keys.setdefault(record.key, number)) != number:
            message = f"{where}: rows must differ, got the content of row {first} again. Remove it."
            yield Problem(record.id, where, "", "duplicate-row", message)


def near_images(row: DecodedRow, max_hamming: int) -> Iterator[Problem]:
    """Yield problems of retrieved images that look like their original. Code: ``near-images``.

    Args:
        row: Row with its images.
        max_hamming: Largest number of differing bits at which two perceptual hashes are of copies.
    """
    for image, retrieved in zip(row.images, row.rejected_images, strict=False):
        if not isinstance(image, ImageFacts) or not isinstance(retrieved, ImageFacts):
            continue
        bits = hamming(image.perceptual_hash, retrieved.perceptual_hash)
        if image.sha256 != retrieved.sha256 and bits <= max_hamming:
            where = row.record.where
            message = (
                f"{where}: retrieved_image must look different from image, got perceptual hashes "
                f"that differ in {bits} of 64 bits. Retrieve another image, or lower max_hamming."
            )
            yield Problem(row.record.id, where, "rejected_images", "near-images", message)


class EvalImages:
    """The images of an evaluation, which no row may hold.

    Args:
        folder: Folder of the images: all JPEG, PNG and WebP files at any depth.
        workers: Number of processes (see :func:`realign.data.image_pool.inspect_images`).
    Raises:
        RefusedError: The folder does not exist or holds no image.
    """

    def __init__(self, folder: Path, workers: int) -> None:
        check_image_root(folder)
        paths = sorted(path for path in folder.rglob("*") if path.suffix.lower() in _SUFFIXES)
        if not paths:
            raise RefusedError(
                f"eval_images must hold images, got {folder}, which has none that ends in "
                f"{', '.join(sorted(_SUFFIXES))}. Check --eval-images."
            )
        self.unreadable: list[RefusedImage] = []
        self._names: list[str] = []
        self._by_digest: dict[str, str] = {}
        hashes = []
        for path, facts in zip(paths, inspect_images(paths, workers=workers), strict=True):
            if isinstance(facts, RefusedImage):
                self.unreadable.append(facts)
                continue
            name = str(path.relative_to(folder))
            self._names.append(name)
            self._by_digest.setdefault(facts.sha256, name)
            hashes.append(facts.perceptual_hash)
        self._hashes = np.array(hashes, dtype=np.uint64)

    def __len__(self) -> int:
        return len(self._names)

    def find(self, row: DecodedRow) -> tuple[list[Problem], list[Problem]]:
        """Return the problems (code ``leak``, evaluation images) and the warnings (``near-leak``,
        images that look like one) of a row.
        """
        leaks: list[Problem] = []
        near: list[Problem] = []
        record = row.record
        for rejected, images in ((False, row.images), (True, row.rejected_images)):
            field = "rejected_images" if rejected else "images"
            where = record.image_place(rejected=rejected)
            for facts in images:
                if not isinstance(facts, ImageFacts):
                    continue
                if name := self._by_digest.get(facts.sha256):
                    message = f"{where}: image must not be one of the evaluation, got {name!r}. "
                    message += "Remove the row."
                    leaks.append(Problem(record.id, record.where, field, "leak", message))
                elif found := self._nearest(facts.perceptual_hash):
                    name, bits = found
                    message = f"{where}: image looks like {name!r} of the evaluation, {bits} of 64 "
                    message += "bits of their perceptual hashes differ. Compare them."
                    near.append(Problem(record.id, record.where, field, "near-leak", message))
        return leaks, near

    def _nearest(self, perceptual_hash: int) -> tuple[str, int] | None:
        if not len(self._hashes):
            return None
        bits = np.bitwise_count(self._hashes ^ np.uint64(perceptual_hash))
        nearest = int(bits.argmin())
        return (self._names[nearest], int(bits[nearest])) if bits[nearest] <= NEAR_BITS else None
