"""Pairs with their images for a static page; an image that cannot be opened is replaced by the
reason.
"""

from __future__ import annotations

from collections.abc import Sequence

from realign.errors import RefusedError
from realign.pair_view import PairView
from realign.records import Record
from realign.thumbnails import data_uri

Picture = dict[str, str]


def shown_pair(record: Record) -> dict[str, object]:
    """What the template ``pair.html.j2`` takes."""
    return {
        "view": PairView.of(record),
        "original": _picture(record.images, f"{record.where}, images"),
        "retrieved": _picture(record.rejected_images, f"{record.where}, rejected_images"),
    }


def _picture(images: Sequence[bytes], where: str) -> Picture | None:
    if not images:
        return None
    try:
        return {"src": data_uri(images[0], where), "full": "", "problem": ""}
    except RefusedError as error:
        return {"src": "", "full": "", "problem": str(error)}


def spread(records: Sequence[Record], count: int) -> list[Record]:
    """Evenly spaced, so that the sample is neither the head of the file nor anybody's choice."""
    count = min(count, len(records))
    return [records[i * len(records) // count] for i in range(count)]
