"""The rows of a dataset with what their images are, in order, while workers decode ahead."""

from __future__ import annotations

import hashlib
from collections import deque
from collections.abc import Iterable, Iterator
from concurrent.futures import Future
from dataclasses import dataclass

from realign.data.image_pool import ImageFacts, ImagePool
from realign.data.images import RefusedImage, Size
from realign.data.records import Problem, Record

Inspected = ImageFacts | RefusedImage


@dataclass(frozen=True)
class DecodedRow:
    """A record and what each of its images is."""

    record: Record
    images: tuple[Inspected, ...]
    rejected_images: tuple[Inspected, ...]

    @property
    def sizes(self) -> tuple[list[Size], list[Size]]:
        """Width and height of the original and of the retrieved images that are good."""
        images, rejected_images = (
            [(one.width, one.height) for one in found if isinstance(one, ImageFacts)]
            for found in (self.images, self.rejected_images)
        )
        return images, rejected_images


def decoded_rows(
    rows: Iterable[Record | list[Problem]], pool: ImagePool
) -> Iterator[DecodedRow | list[Problem]]:
    """Decode every image once, by content; rows that could not be read pass through."""
    known: dict[str, Inspected] = {}
    asked: dict[str, Future[Inspected]] = {}
    waiting: deque[list[Problem] | tuple[Record, list[str], list[str]]] = deque()

    def ask(raw: bytes) -> str:
        digest = hashlib.sha256(raw).hexdigest()
        if digest not in known and digest not in asked:
            asked[digest] = pool.submit(raw, "image")
        return digest

    def answer(digest: str) -> Inspected:
        if digest not in known:
            known[digest] = asked.pop(digest).result()
        return known[digest]

    def next_row() -> DecodedRow | list[Problem]:
        row = waiting.popleft()
        if isinstance(row, list):
            return row
        record, images, rejected = row
        return DecodedRow(record, tuple(map(answer, images)), tuple(map(answer, rejected)))

    for row in rows:
        if isinstance(row, Record):
            waiting.append(
                (row, [ask(raw) for raw in row.images], [ask(raw) for raw in row.rejected_images])
            )
        else:
            waiting.append(row)
        if len(waiting) >= pool.ahead:
            yield next_row()
    while waiting:
        yield next_row()
