"""Decoding of images from untrusted datasets to RGB: three formats, limited size, one frame."""

from __future__ import annotations

import io
import re
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import IO

import numpy as np
from PIL import ExifTags, Image, ImageOps, UnidentifiedImageError

from realign.errors import RefusedError

FORMATS = ("JPEG", "PNG", "WEBP")
Size = tuple[int, int]  # width and height
MAX_BYTES = 50_000_000
MAX_PIXELS = 89_478_485  # Pillow's own limit; phones write 48 million and more
MIN_SIDE, MAX_SIDE = 2, 20_000
STRIP = 64  # number of lines that are scaled at a time
# first bytes of other formats that cameras and programs write
_OTHERS = {
    "HEIC": rb"....ftyp(he|m[is]f1)",
    "AVIF": rb"....ftypavi",
    "TIFF or camera raw": rb"II\*\0|MM\0\*|....ftypcrx|FUJIFILM",
    "GIF": rb"GIF8",
    "BMP": rb"BM",
    "JPEG 2000 or XL": rb"....(jP  |JXL )|\xff(\x4f|\x0a)",
}
# messages of Pillow about texts and profiles that decompress to more than it allows
_METADATA = (
    *("MAX_TEXT_CHUNK", "MAX_TEXT_MEMORY", "too much memory used in text chunks"),
    "Decompressed Data Too Large",  # for a text chunk or a profile, in Pillow 10
)


class RefusedImage(RefusedError):
    """Refusal of an image file that cannot be opened, or is not an image.

    Args:
        where: Name of the image, with which the message begins.
        reason: The rule, the value and the remedy.
        code: ``image-name``, ``url``, ``outside-root``, ``missing``, ``unreadable``,
            ``too-many-bytes``, ``too-many-pixels``, ``side``, ``frames``, ``format``,
            ``metadata``, ``damaged``; from workers also ``memory``, ``timeout``, ``crashed``.
        missing: Name of the file, if it does not exist.
    """

    def __init__(self, where: str, reason: str, code: str, missing: str = "") -> None:
        super().__init__(f"{where}: {reason}", code=code, field="image", missing=missing)
        self.where, self.reason = where, reason

    def __reduce__(self) -> tuple[type[RefusedImage], tuple[str, str, str, str]]:
        return RefusedImage, (self.where, self.reason, self.code, self.missing)

    def with_remedy(self, remedy: str) -> RefusedImage:
        """Return the same refusal with a further remedy."""
        return RefusedImage(
            self.where, f"{self.reason.removesuffix('.')}, {remedy}.", self.code, self.missing
        )

    def at(self, where: str) -> RefusedImage:
        """Return the same refusal with another name of the image."""
        return RefusedImage(where, self.reason, self.code, self.missing)


@dataclass(frozen=True)
class ImageFacts:
    """Facts of an image that was decoded.

    Attributes:
        sha256: SHA-256 of the file's bytes.
        width: Width of the decoded image, after its EXIF rotation.
        height: Height of the decoded image, likewise.
        perceptual_hash: See :func:`realign.data.perceptual_hash.perceptual_hash`.
    """

    sha256: str
    width: int
    height: int
    perceptual_hash: int


def read_image(path: Path, where: str) -> bytes:
    """Read an image file of at most ``MAX_BYTES``.

    Raises:
        RefusedImage: The file is larger, or cannot be read.
    """
    try:
        with path.open("rb") as file:
            raw = file.read(MAX_BYTES + 1)
            num_bytes = len(raw) if len(raw) <= MAX_BYTES else path.stat().st_size
    except OSError as error:
        reason = f"image must be a file that can be read ({error.strerror}). Check it."
        code = "missing" if isinstance(error, FileNotFoundError) else "unreadable"
        raise RefusedImage(where, reason, code) from None
    _check_bytes(num_bytes, where)
    return raw


def image_size(file: Path | IO[bytes]) -> tuple[int, int]:
    """Return width and height as :func:`decode_image` would, from the header alone."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # decode_image reports what is wrong
        image = Image.open(file, formats=FORMATS)
    with image:
        # 5 to 8 are the EXIF orientations with a quarter turn
        is_turned = image.getexif().get(ExifTags.Base.Orientation, 1) >= 5
        return image.size[::-1] if is_turned else image.size


def decode_image(raw: bytes, where: str, max_pixels: int | None = None) -> Image.Image:
    """Decode image bytes to RGB, with EXIF rotation, transparency over white, 16-bit grey scaled.

    A JPEG may hold further pictures (MPO: previews, depth, the other eye); the first is decoded.

    Args:
        raw: The file's bytes.
        where: Name of the image, for a refusal.
        max_pixels: Largest number of pixels that is decoded, by default ``MAX_PIXELS``. An image of
            more than ``MAX_PIXELS`` is halved until it has at most that many, which requires that
            the process has lifted Pillow's own limit.
    Raises:
        RefusedImage: The file is not JPEG, PNG or WebP, damaged, too small or large, or animated.
    """
    _check_bytes(len(raw), where)
    with _refusing(raw, where), warnings.catch_warnings():
        # about damaged metadata, which is not used, and about sizes, which are checked here
        warnings.simplefilter("ignore")
        image = Image.open(io.BytesIO(raw), formats=FORMATS)
        _check_size(image, where, max_pixels or MAX_PIXELS)
        if image.format != "MPO" and (frames := getattr(image, "n_frames", 1)) != 1:
            reason = f"image must have one frame, got {frames}. Save one frame."
            raise RefusedImage(where, reason, "frames")
        if image.width * image.height > MAX_PIXELS:
            image.draft("RGB", (image.width // 2, image.height // 2))  # cheap scaling of a JPEG
        image.load()
        ImageOps.exif_transpose(image, in_place=True)  # no copy of images without rotation
        decoded = to_rgb(image)
        while decoded.width * decoded.height > MAX_PIXELS:
            decoded = decoded.reduce(2)
        return decoded


def to_rgb(image: Image.Image) -> Image.Image:
    """Convert an image of any mode to RGB: 16-bit grey scaled by 1/257, transparency over white."""
    if image.mode.startswith("I"):  # Pillow would saturate it
        return _grey_of_16_bits(image)
    if image.mode in ("RGBA", "LA", "PA") or "transparency" in image.info:
        rgba = image.convert("RGBA")
        return Image.alpha_composite(Image.new("RGBA", rgba.size, "white"), rgba).convert("RGB")
    return image.convert("RGB")


def _grey_of_16_bits(image: Image.Image) -> Image.Image:
    transparent = image.info.get("transparency")
    grey = np.empty((image.height, image.width), np.uint8)
    for top in range(0, image.height, STRIP):  # at once, the largest image would take a gigabyte
        bottom = min(top + STRIP, image.height)
        values = np.asarray(image.crop((0, top, image.width, bottom))).astype(np.int32)
        scaled = (values.clip(0, 65535) + 128) // 257  # to the nearest
        if isinstance(transparent, int):
            scaled[values == transparent] = 255
        grey[top:bottom] = scaled
    return Image.fromarray(grey).convert("RGB")


def _check_bytes(num_bytes: int, where: str) -> None:
    if num_bytes > MAX_BYTES:
        reason = f"image must have at most {MAX_BYTES} bytes, got {num_bytes}. Shrink it."
        raise RefusedImage(where, reason, "too-many-bytes")


def _check_size(image: Image.Image, where: str, max_pixels: int) -> None:
    if not MIN_SIDE <= min(image.size) <= max(image.size) <= MAX_SIDE:
        reason = (
            f"image must have sides of {MIN_SIDE} to {MAX_SIDE} pixels, got {image.size}. "
            "Replace it or remove the row."
        )
        raise RefusedImage(where, reason, "side")
    if image.width * image.height > max_pixels:
        reason = f"image must have at most {max_pixels} pixels, got {image.size}. Shrink it."
        raise RefusedImage(where, reason, "too-many-pixels")


@contextmanager
def _refusing(raw: bytes, where: str) -> Iterator[None]:
    """Turn any exception of a decoder into a refusal."""
    try:
        yield
    except (RefusedImage, MemoryError):
        raise
    except Image.DecompressionBombError as error:
        reason = f"image must have at most {MAX_PIXELS} pixels ({error}). Shrink it."
        raise RefusedImage(where, reason, "too-many-pixels") from None
    except UnidentifiedImageError:  # its message is the address of the buffer
        raise RefusedImage(where, format_problem(raw), "format") from None
    except Exception as error:  # decoders raise all kinds of exceptions on damaged files
        is_metadata = any(phrase in str(error) for phrase in _METADATA)
        fault = "has too much metadata" if is_metadata else "is damaged"
        reason = f"image {fault} ({error}). Replace it or remove the row."
        raise RefusedImage(where, reason, "metadata" if is_metadata else "damaged") from None


def format_problem(raw: bytes) -> str:
    """Return the message for bytes that are not a readable JPEG, PNG or WebP file."""
    rule, remedy = f"image must be a readable {', '.join(FORMATS)} file", "Replace it"
    found = f"{len(raw)} bytes that begin with {raw[:12]!r}" if raw else "no bytes"
    for name, beginning in _OTHERS.items():
        if re.match(beginning, raw, re.DOTALL):
            found, remedy = f"a file of the format {name}", "Convert it to JPEG or PNG"
    return f"{rule}, got {found}. {remedy} or remove the row."
