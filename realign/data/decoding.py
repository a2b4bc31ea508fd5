"""Decodes the images of a dataset's rows, in order, while workers are ahead."""

from __future__ import annotations

import hashlib
from collections import deque
from collections.abc import Iterable, Iterator
from concurrent.futures import Future

from realign.data.image_pool import ImagePool
from realign.data.records import DecodedRow, Inspected, Problem, Record


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
