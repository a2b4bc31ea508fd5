"""Images of more pixels than training opens, as phones write them: smaller copies are used."""

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

# 200 million pixels with transparency and a copy of them take three gigabytes, and seconds
WORKERS, WORKER_BYTES, LONGEST_S = 2, 6 << 30, 60.0


def shrink_large_images(
    rows: Sequence[SourceRow], folder: Path, max_pixels: int
) -> tuple[list[SourceRow], dict[Path, RefusedImage]]:
    """Return the rows with a smaller copy of each image that is too large, and why some have none.

    Which images have a copy depends on the images and on ``max_pixels``, never on copies that a
    build with another ``max_pixels`` left in the folder.

    Args:
        rows: The rows.
        folder: Where copies are written, named by the SHA-256 of the image and ``max_pixels``; one
            that is there is used.
        max_pixels: Largest image that is shrunk; those that are larger are left for the inspection
            to refuse. At most ``MAX_PIXELS`` leaves all as they are.
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
    except Image.DecompressionBombError:  # beyond what Pillow opens in a process with its limit
        return True
    except (OSError, ValueError, SyntaxError):
        return False
    return width * height > MAX_PIXELS
