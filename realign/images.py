"""Opening images from untrusted datasets: three formats, bounded size, one frame, RGB, inside the
data root.
"""

from __future__ import annotations

import io
import warnings
from pathlib import Path

from PIL import ExifTags, Image, ImageOps, UnidentifiedImageError

from realign.errors import RefusedError

FORMATS = ("JPEG", "PNG", "WEBP")
MAX_BYTES = 50_000_000
MAX_PIXELS = 40_000_000


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
        name: A relative path from the dataset. URLs and paths that leave ``root`` are refused.
        where: The row, for the message.
    Raises:
        RefusedError: The name is absolute, a URL, leaves the folder, or no such file exists.
    """
    if not isinstance(name, str) or not name or "\0" in name:
        raise RefusedError(
            f"{where}: image must be a file name, got {name!r:.80}. Name a file of the image "
            "folder."
        )
    if "://" in name or name.startswith("data:"):
        raise RefusedError(
            f"{where}: image must be a file name, got the URL {name[:80]!r}. Download it first."
        )
    path = (root / name).resolve()
    if not path.is_relative_to(root.resolve()):
        raise RefusedError(f"{where}: image must lie inside {root}, got {name!r}. Move it there.")
    if not path.is_file():
        raise RefusedError(
            f"{where}: image {name!r} does not exist in {root}. Check --images or remove the row."
        )
    return path


def image_size(path: Path) -> tuple[int, int]:
    """Width and height as :func:`decode_image` would give them, read from the header."""
    with Image.open(path, formats=FORMATS) as image:
        # 5 to 8 are the EXIF orientations with a quarter turn
        is_turned = image.getexif().get(ExifTags.Base.Orientation, 1) >= 5
        return image.size[::-1] if is_turned else image.size


def decode_image(raw: bytes, where: str) -> Image.Image:
    """Decode image bytes to RGB: EXIF rotation applied, transparency over white, 16 bits scaled
    down.

    Raises:
        RefusedError: Not a JPEG, PNG or WebP file, damaged, too large, or more than one frame.
    """
    if len(raw) > MAX_BYTES:
        raise RefusedError(
            f"{where}: image must have at most {MAX_BYTES} bytes, got {len(raw)}. Shrink it."
        )
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("error", Image.DecompressionBombWarning)
            image = Image.open(io.BytesIO(raw), formats=FORMATS)
            if image.width * image.height > MAX_PIXELS:
                raise RefusedError(
                    f"{where}: image must have at most {MAX_PIXELS} pixels, got {image.size}. "
                    f"Shrink it."
                )
            if (frames := getattr(image, "n_frames", 1)) != 1:
                raise RefusedError(
                    f"{where}: image must have one frame, got {frames}. Save one frame."
                )
            image.load()
    except (Image.DecompressionBombError, Image.DecompressionBombWarning) as error:
        raise RefusedError(
            f"{where}: image must have at most {MAX_PIXELS} pixels ({error}). Shrink it."
        ) from None
    except UnidentifiedImageError:  # its text is the address of our buffer
        raise RefusedError(
            f"{where}: image must be a readable {', '.join(FORMATS)} file, got "
            f"{_beginning(raw)}. Replace it or remove the row."
        ) from None
    except (OSError, SyntaxError, ValueError) as error:
        if isinstance(error, RefusedError):
            raise
        raise RefusedError(
            f"{where}: image is damaged ({error}). Replace it or remove the row."
        ) from None
    return _to_rgb(ImageOps.exif_transpose(image))


def _beginning(raw: bytes) -> str:
    return f"{len(raw)} bytes that begin with {raw[:12]!r}" if raw else "no bytes"


def _to_rgb(image: Image.Image) -> Image.Image:
    if image.mode.startswith("I"):  # 16-bit grey: Pillow would saturate it
        return image.convert("I").point(lambda value: value / 257).convert("L").convert("RGB")
    if image.mode in ("RGBA", "LA", "PA") or "transparency" in image.info:
        rgba = image.convert("RGBA")
        return Image.alpha_composite(Image.new("RGBA", rgba.size, "white"), rgba).convert("RGB")
    return image.convert("RGB")
