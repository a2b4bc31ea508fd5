"""Opening images from untrusted datasets: three formats, bounded size, one frame, RGB, inside the
data root.
"""

from __future__ import annotations

import base64
import io
import posixpath
import re
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import IO

import numpy as np
from PIL import ExifTags, Image, ImageOps, UnidentifiedImageError

from realign.errors import RefusedError

FORMATS = ("JPEG", "PNG", "WEBP")
Size = tuple[int, int]  # width and height
MAX_BYTES = 50_000_000
MAX_PIXELS = 40_000_000
MIN_SIDE, MAX_SIDE = 2, 20_000
# a scheme and a slash, a scheme that needs none, or a host without a scheme; any case
_URL = re.compile(
    r"\s*([a-z][a-z0-9+.-]*:[/\\]|(data|file|https?|ftp|blob|javascript|urn):|[/\\]{2})", re.I
)
# what Pillow says of text and profiles that unpack to more than it allows
_METADATA = ("MAX_TEXT_CHUNK", "MAX_TEXT_MEMORY", "too much memory used in text chunks")
SIDE = 264  # pixels; shown at half of it, sharp on dense screens


class RefusedImage(RefusedError):
    """An image file that is not opened, or not as an image.

    Args:
        where: What names the image, in front of the message.
        reason: The value and the remedy.
        code: ``image-name``, ``url``, ``outside-root``, ``missing``, ``unreadable``,
            ``too-many-bytes``, ``too-many-pixels``, ``side``, ``frames``, ``format``,
            ``metadata``, ``damaged``; from workers also ``memory``, ``timeout``, ``crashed``.
    """

    def __init__(self, where: str, reason: str, code: str) -> None:
        super().__init__(f"{where}: {reason}", code=code, field="image")
        self.where, self.reason = where, reason

    def __reduce__(self) -> tuple[type[RefusedImage], tuple[str, str, str]]:
        return RefusedImage, (self.where, self.reason, self.code)

    def at(self, where: str) -> RefusedImage:
        """The same refusal of the same image in another place."""
        return RefusedImage(where, self.reason, self.code)


def check_image_root(root: Path) -> None:
    """Refuse an image folder that is none: every image would be missing from it.

    Raises:
        RefusedError: Naming the folder.
    """
    if not root.is_dir():
        raise RefusedError(f"images must be an existing folder, got {root}. Check --images.")


def resolve_image(root: Path, name: str, where: str) -> Path:
    """Return the path of image ``name`` under ``root``.

    Args:
        root: The image folder.
        name: A relative path from the dataset. URLs and paths that leave ``root``, by themselves
            or through a link, are refused.
        where: The row, for the message.
    Raises:
        RefusedImage: The name is absolute, a URL, leaves the folder, or no such file exists.
    """
    if not isinstance(name, str) or not name or "\0" in name:
        reason = f"image must be a file name, got {name!r:.80}. Name a file of the image folder."
        raise RefusedImage(where, reason, "image-name")
    if "://" in name or _URL.match(name):
        reason = f"image must be a file name, got the URL {name[:80]!r}. Download it first."
        raise RefusedImage(where, reason, "url")
    try:
        path = (root / name).resolve()
        is_inside, is_file = path.is_relative_to(root.resolve()), path.is_file()
    # too long, not in the file system's encoding, a loop of links, a folder that is locked
    except (OSError, ValueError, RuntimeError) as error:
        said = f"{name[:80]!r} ({error!s:.80})"
        reason = f"image must be a file that can be opened, got {said}. Rename it."
        raise RefusedImage(where, reason, "unreadable") from None
    if not is_inside:
        by_link = ", a link that leaves it" if not is_outside_name(name) else ""
        reason = f"image must lie inside {root}, got {name[:200]!r}{by_link}. Copy it there."
        raise RefusedImage(where, reason, "outside-root")
    if not is_file:
        reason = f"image {name!r} does not exist in {root}. Check --images or remove the row."
        raise RefusedImage(where, reason, "missing")
    return path


def is_outside_name(name: str) -> bool:
    """Whether a name leaves its folder without any link."""
    path = posixpath.normpath(name.replace("\\", "/"))
    return path.startswith(("/", "../")) or path == ".."


def read_image(path: Path, where: str) -> bytes:
    """Read an image file of at most ``MAX_BYTES``.

    Raises:
        RefusedImage: It is larger, or cannot be read.
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
    """Width and height as :func:`decode_image` would give them, read from the header."""
    with Image.open(file, formats=FORMATS) as image:
        # 5 to 8 are the EXIF orientations with a quarter turn
        is_turned = image.getexif().get(ExifTags.Base.Orientation, 1) >= 5
        return image.size[::-1] if is_turned else image.size


def decode_image(raw: bytes, where: str) -> Image.Image:
    """Decode image bytes to RGB: EXIF rotation applied, transparency over white, 16-bit grey
    scaled down.

    Raises:
        RefusedImage: Not a JPEG, PNG or WebP file, damaged, too small or large, or more than one
            frame.
    """
    _check_bytes(len(raw), where)
    with _refusing(raw, where), warnings.catch_warnings():
        # of damaged metadata, which is not used, and of sizes, which are checked here
        warnings.simplefilter("ignore")
        image = Image.open(io.BytesIO(raw), formats=FORMATS)
        _check_size(image, where)
        if (frames := getattr(image, "n_frames", 1)) != 1:
            reason = f"image must have one frame, got {frames}. Save one frame."
            raise RefusedImage(where, reason, "frames")
        image.load()
        ImageOps.exif_transpose(image, in_place=True)  # else it copies what needs no turn
        return to_rgb(image)


def to_rgb(image: Image.Image) -> Image.Image:
    """RGB of an image in any mode: 16-bit grey scaled by 1/257, transparency over white."""
    if image.mode.startswith("I"):  # Pillow would saturate it
        return _grey_of_16_bits(image)
    if image.mode in ("RGBA", "LA", "PA") or "transparency" in image.info:
        rgba = image.convert("RGBA")
        return Image.alpha_composite(Image.new("RGBA", rgba.size, "white"), rgba).convert("RGB")
    return image.convert("RGB")


def _grey_of_16_bits(image: Image.Image) -> Image.Image:
    values = np.asarray(image).astype(np.int32)
    grey = ((values.clip(0, 65535) + 128) // 257).astype(np.uint8)  # to the nearest
    if isinstance(transparent := image.info.get("transparency"), int):
        grey[values == transparent] = 255
    return Image.fromarray(grey).convert("RGB")


def _check_bytes(num_bytes: int, where: str) -> None:
    if num_bytes > MAX_BYTES:
        reason = f"image must have at most {MAX_BYTES} bytes, got {num_bytes}. Shrink it."
        raise RefusedImage(where, reason, "too-many-bytes")


def _check_size(image: Image.Image, where: str) -> None:
    if not MIN_SIDE <= min(image.size) <= max(image.size) <= MAX_SIDE:
        reason = (
            f"image must have sides of {MIN_SIDE} to {MAX_SIDE} pixels, got {image.size}. "
            "Replace it or remove the row."
        )
        raise RefusedImage(where, reason, "side")
    if image.width * image.height > MAX_PIXELS:
        reason = f"image must have at most {MAX_PIXELS} pixels, got {image.size}. Shrink it."
        raise RefusedImage(where, reason, "too-many-pixels")


@contextmanager
def _refusing(raw: bytes, where: str) -> Iterator[None]:
    """Turn whatever a decoder raises into a refusal."""
    try:
        yield
    except (RefusedImage, MemoryError):
        raise
    except Image.DecompressionBombError as error:
        reason = f"image must have at most {MAX_PIXELS} pixels ({error}). Shrink it."
        raise RefusedImage(where, reason, "too-many-pixels") from None
    except UnidentifiedImageError:  # its text is the address of our buffer
        begins = f"{len(raw)} bytes that begin with {raw[:12]!r}" if raw else "no bytes"
        kind = f"readable {', '.join(FORMATS)} file"
        reason = f"image must be a {kind}, got {begins}. Replace it or remove the row."
        raise RefusedImage(where, reason, "format") from None
    except Exception as error:  # on damaged files, decoders raise any
        is_metadata = any(said in str(error) for said in _METADATA)
        what = "has too much metadata" if is_metadata else "is damaged"
        reason = f"image {what} ({error}). Replace it or remove the row."
        raise RefusedImage(where, reason, "metadata" if is_metadata else "damaged") from None


def image_suffix(raw: bytes) -> str | None:
    """The suffix of a JPEG, PNG or WebP file by how its bytes begin; None for anything else."""
    if raw.startswith(b"\xff\xd8\xff"):
        return ".jpg"
    if raw.startswith(b"\x89PNG\r\n\x1a\n"):
        return ".png"
    return ".webp" if raw[:4] == b"RIFF" and raw[8:12] == b"WEBP" else None


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
