"""Random changes to training images that are the same after a kill: their randomness comes from
the seed, the epoch and the row, never from a generator that a process has advanced.
"""

from __future__ import annotations

import io
import random
from collections.abc import Callable, Sequence
from dataclasses import dataclass, fields
from functools import cached_property

import torch
from PIL import Image
from torch.utils.data import Dataset

from realign.data.images import decode_image
from realign.data.records import Record
from realign.runtime.files import content_sha256

Augment = Callable[[Image.Image, random.Random], Image.Image]
"""From an RGB image and its own generator to an RGB image. All randomness must be the generator's;
``rng.getrandbits(63)`` seeds one of another library."""


@dataclass(frozen=True)
class AugmentedRecord(Record):
    """A record with other images; references are found by the row that it was."""

    original_key: str = ""

    @cached_property
    def key(self) -> str:
        """Of the record before its images were changed."""
        return self.original_key


class RecordDataset(Dataset[Record]):
    """Records as a torch dataset, their images changed by a function where one is given.

    Args:
        records: The rows.
        augment: Changes every image, original and retrieved; see :data:`Augment`.
        seed: Of its randomness.
    """

    def __init__(
        self, records: Sequence[Record], augment: Augment | None = None, seed: int = 0
    ) -> None:
        self.records, self.augment, self.seed = records, augment, seed
        # shared memory: workers that live longer than an epoch see the next one
        self._epoch = torch.zeros(1, dtype=torch.int64).share_memory_() if augment else None

    def set_epoch(self, epoch: int) -> None:
        """Draw anew from here on; called before the first row of an epoch is read."""
        if self._epoch is not None:
            self._epoch.fill_(epoch)

    def __len__(self) -> int:
        return len(self.records)

    def __getitem__(self, index: int) -> Record:
        record = self.records[index]
        if self.augment is None or self._epoch is None:
            return record
        return augmented(record, self.augment, self.seed, int(self._epoch))


def augmented(record: Record, augment: Augment, seed: int, epoch: int) -> AugmentedRecord:
    """Return ``record`` with every image changed, by a generator of its own."""
    values = {field.name: getattr(record, field.name) for field in fields(Record)}
    for name in ("images", "rejected_images"):
        place = record.image_place(rejected=name == "rejected_images")
        images = []
        for number, raw in enumerate(values[name]):
            digest = content_sha256(str(seed), str(epoch), record.id, name, str(number))
            images.append(_png(augment(decode_image(raw, place), random.Random(digest))))
        values[name] = tuple(images)
    return AugmentedRecord(**values, original_key=record.key)


def _png(image: Image.Image) -> bytes:
    """Lossless, and quick to write: it is read again within the batch."""
    buffer = io.BytesIO()
    image.save(buffer, "PNG", compress_level=1)
    return buffer.getvalue()
