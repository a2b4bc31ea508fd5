"""Small images for pages: bounded in size whatever the dataset holds."""

from __future__ import annotations

import base64
import io

from realign.images import decode_image

SIDE = 264  # pixels; shown at half of it, sharp on dense screens


def thumbnail(raw: bytes, where: str, side: int = SIDE) -> bytes:
    """WebP bytes of an image reduced to at most ``side`` pixels.

    Raises:
        RefusedError: The image is none that the project opens; the message names ``where``.
    """
    image = decode_image(raw, where)
    image.thumbnail((side, side))
    buffer = io.BytesIO()
    image.save(buffer, "WEBP", quality=80)
    return buffer.getvalue()


def data_uri(raw: bytes, where: str, side: int = SIDE) -> str:
    """The thumbnail inside a page."""
    return "data:image/webp;base64," + base64.b64encode(thumbnail(raw, where, side)).decode()
