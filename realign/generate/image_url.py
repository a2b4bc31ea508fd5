"""An image file as the data URL that chat servers take, so that a server sees what training
sees.
"""

from __future__ import annotations

import base64
import io
from pathlib import Path

from PIL import ExifTags, Image

from realign.errors import RefusedError
from realign.images import FORMATS, decode_image

# OpenAI takes 50 MB in one request; base64 makes three bytes four
MAX_SENT_BYTES = 20_000_000


class TooLargeError(RefusedError):
    """An image that cannot be sent whatever its encoding: the fault of one request."""


def image_url(path: Path, max_bytes: int = MAX_SENT_BYTES) -> str:
    """Encode an image file as ``data:image/...;base64,...``.

    The file's own bytes are sent where every decoder makes the same picture of them: RGB or grey of
    eight bits, no rotation in EXIF, no transparency. Others are decoded by
    :func:`realign.images.decode_image` and sent as PNG, or as JPEG of quality 95 where that or the
    file has more than ``max_bytes``.

    Raises:
        TooLargeError: The image is too large as JPEG too.
        RefusedError: The image cannot be read.
    """
    raw = path.read_bytes()
    decoded = decode_image(raw, path.name)  # what would be refused in training is not asked about
    with Image.open(io.BytesIO(raw)) as image:
        mime = f"image/{(image.format or '').lower()}"
        is_plain = (
            image.format in FORMATS  # a JPEG with a preview beside it calls itself MPO
            and image.mode in ("RGB", "L")
            and "transparency" not in image.info
            and image.getexif().get(ExifTags.Base.Orientation, 1) == 1
        )
    if not is_plain:
        raw, mime = _encoded(decoded, "PNG"), "image/png"
    if len(raw) > max_bytes:
        raw, mime = _encoded(decoded, "JPEG"), "image/jpeg"
    if len(raw) > max_bytes:
        raise TooLargeError(
            f"{path.name}: image must fit into {max_bytes} bytes as JPEG to be sent, got "
            f"{len(raw)}. Shrink it."
        )
    return f"data:{mime};base64,{base64.b64encode(raw).decode()}"


def _encoded(image: Image.Image, form: str) -> bytes:
    buffer = io.BytesIO()
    options = {"quality": 95, "subsampling": 0} if form == "JPEG" else {}
    image.save(buffer, form, **options)
    return buffer.getvalue()
