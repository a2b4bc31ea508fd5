"""Pairs that differ in everything a layout could get wrong."""

from __future__ import annotations

import io
from functools import cache

import numpy as np
from PIL import Image

from realign.data.records import Record

SHORT = "No, there is a boat."
LONG = "There is a red house at the top left, a tree at the top and a moon in the middle."


@cache
def photo(width: int, height: int, seed: int) -> bytes:
    """A PNG file of noise, in which every pixel matters."""
    pixels = np.random.default_rng(seed).integers(0, 256, (height, width, 3), dtype=np.uint8)
    buffer = io.BytesIO()
    Image.fromarray(pixels).save(buffer, "PNG")
    return buffer.getvalue()


WIDE, TALL, SQUARE, BROAD = (
    photo(90, 50, 0), photo(40, 100, 1), photo(64, 64, 2), photo(120, 40, 3)
)  # fmt: skip


def pair(name: str, question: str, images: tuple[bytes, ...], chosen: str, rejected: str,
         retrieved: tuple[bytes, ...]) -> Record:  # fmt: skip
    """A record with one user turn."""
    turn = {"role": "user", "content": question}
    return Record(name, images, (turn,), chosen, rejected, retrieved)


def all_kinds() -> list[Record]:
    """A longer rejected answer and a longer chosen one, to the same image; a pair without a
    retrieved image; several images; none.
    """
    return [
        pair("longer rejected", "Describe the image.", (WIDE,), SHORT, LONG, (TALL,)),
        pair("longer chosen", "Is there a boat?", (WIDE,), LONG, SHORT, (SQUARE,)),
        pair("not retrieved", "Where is the house?", (TALL,), LONG + " " + SHORT, LONG, ()),
        pair("two images", "What differs?", (SQUARE, BROAD), LONG, SHORT, (WIDE, TALL)),
        pair("text only", "What is a house?", (), SHORT, LONG, ()),
    ]
