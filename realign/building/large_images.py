"""Smaller copies of images with more pixels than training opens, such as those of phones."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

from PIL import Image

from realign.data.formats.source_row import SourceRow
from realign.data.image_pool import ImagePool
from realign.data.images import MAX_BYTES, MAX_PIXELS, RefusedImage, image_size
from realign.runtime.files import file_sha256
from realign.runtime.progress import Progress, announce
from realign.runtime.write_errors import explain_write_errors

# an image of 200 million pixels with transparency and its copy take three gigabytes, and seconds
WORKERS, WORKER_BYTES, LONGEST_S = 2, 6 << 30, 60.0


def shrink_large_images(
    rows: Sequence[SourceRow], folder: Path, max_pixels: int
) -> tuple[list[SourceRow], dict[Path, RefusedImage]]:
    """Return the rows, with smaller copies of images that are too large, and the refusals of images
    that could not be copied.

    Which images are copied depends only on the images and ``max_pixels``, not on copies that a
    build with another ``max_pixels`` left in the folder.

    Args:
        rows: The rows.
        folder: Folder of the copies, which are named by the SHA-256 of the image and
            ``max_pixels``; existing copies are used.
        max_pixels: Largest number of pixels of an image that is shrunk; the inspection refuses
            larger ones. If it is at most ``MAX_PIXELS``, nothing is shrunk.
    Raises:
        RefusedError: A copy cannot be written.
    """
    if max_pixels <= MAX_PIXELS:
        return [*rows], {}
    paths = dict.fromkeys(row.path for row in rows)
    large = {
        path: folder / f"{file_sha256(path)}.{max_pixels}.jpg" for path in paths if _is_large(path)
    }
    missing = [path for path, copy in large.items() if not copy.is_file()]
    failed: dict[Path, RefusedImage] = {}
    if missing:
        with explain_write_errors(folder):
            folder.mkdir(parents=True, exist_ok=True)
        with (
            ImagePool(WORKERS, timeout_s=LONGEST_S, memory_bytes=WORKER_BYTES) as pool,
            Progress("shrink images", len(missing)) as progress,
        ):
            asked = [pool.shrink(path, str(path), large[path], max_pixels) for path in missing]
            for path, inspected in zip(missing, asked, strict=True):
                if isinstance(facts := inspected.result(), RefusedImage):
                    failed[path] = facts
                progress.advance()
    copies = {path: copy for path, copy in large.items() if path not in failed}
    if copies:
        announce(
            f"{len(copies)} images of more than {MAX_PIXELS:,} pixels are used as copies, halved "
            "until they have at most that many"
        )
    return [
        replace(row, path=copies[row.path], source=row.source | {"is_shrunk": True})
        if row.path in copies
        else row
        for row in rows
    ], failed


def _is_large(path: Path) -> bool:
    """Return whether an image has too many pixels; one that cannot be read is not."""
    try:
        if path.stat().st_size > MAX_BYTES:
            return False
        width, height = image_size(path)
    except Image.DecompressionBombError:  # more pixels than Pillow's own limit
        return True
    except (OSError, ValueError, SyntaxError):
        return False
    return width * height > MAX_PIXELS
