"""The image file behind a row's image: a name under the image folder, or bytes that are extracted
once.
"""

from __future__ import annotations

import hashlib
import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from realign.build.sources.layout import RefusedRowError
from realign.errors import RefusedError
from realign.image_suffix import image_suffix
from realign.images import FORMATS, MAX_BYTES, RefusedImage, resolve_image


class ImageFiles:
    """Finds or makes the file of each image; each name is looked up once.

    Args:
        root: Folder of named images; None where all are embedded.
        extract_to: Folder for embedded images; None where none is.
        file_name: What the file of ``{name}`` is called under the root.
    """

    def __init__(
        self, root: Path | None, extract_to: Path | None, file_name: str = "{name}"
    ) -> None:
        self._root, self._extract_to, self._file_name = root, extract_to, file_name
        self._named: dict[str, Path | RefusedRowError] = {}
        self._extracted: set[str] = set()

    def find(self, image: Any) -> tuple[str, Path, str | None]:
        """Name, file, and the source's own name of an embedded image.

        Raises:
            RefusedRowError: No such file, a name that leaves the folder, or no image bytes.
            RefusedError: A folder that the source needs was not given.
        """
        if isinstance(image, Mapping):
            raw = image.get("bytes")
            if isinstance(raw, bytes) and raw:
                return (*self._extract(raw), image.get("path"))
            image = image.get("path")
        if isinstance(image, bytes):
            return (*self._extract(image), None)
        if not isinstance(image, str) or not image:
            raise RefusedRowError(
                "image",
                "wrong-type",
                f"image must be a file name, got {image!r:.80}. Name a file of the image folder.",
            )
        found = self._named.get(image)
        if found is None:
            found = self._named[image] = self._resolve(image)
        if isinstance(found, RefusedRowError):
            raise found
        return image, found, None

    def _resolve(self, name: str) -> Path | RefusedRowError:
        if self._root is None:
            raise RefusedError(
                f"images must name the folder of the source's images such as {name!r:.80}. Pass "
                "--images FOLDER."
            )
        try:
            return resolve_image(self._root, self._file_name.replace("{name}", name), "")
        except RefusedImage as error:
            return RefusedRowError("image", error.code, str(error).removeprefix(": "))
        except (OSError, UnicodeError) as error:  # longer than names can be, or half a character
            text = f"image must be a file name, got {name!r:.80} ({error}). Rename it."
            return RefusedRowError("image", "unreadable", text)

    def _extract(self, raw: bytes) -> tuple[str, Path]:
        suffix = image_suffix(raw)
        if suffix is None:
            raise RefusedRowError(
                "image",
                "format",
                f"image must be {', '.join(FORMATS)} bytes, got {len(raw)} that begin with "
                f"{raw[:12]!r}. Replace it or remove the row.",
            )
        if len(raw) > MAX_BYTES:
            raise RefusedRowError(
                "image",
                "too-many-bytes",
                f"image must have at most {MAX_BYTES} bytes, got {len(raw)}. Shrink it.",
            )
        if self._extract_to is None:
            raise RefusedError(
                "source has embedded images and extract_to names no folder to keep them in. Give "
                "one."
            )
        name = hashlib.sha256(raw).hexdigest() + suffix
        path = self._extract_to / name
        if name not in self._extracted:
            # no fsync an image: what a power cut leaves is compared, and written again
            if not path.is_file() or path.read_bytes() != raw:
                self._extract_to.mkdir(parents=True, exist_ok=True)
                temporary = path.with_name(f".{name}.{os.getpid()}.tmp")
                try:
                    temporary.write_bytes(raw)
                    temporary.replace(path)
                finally:
                    temporary.unlink(missing_ok=True)
            self._extracted.add(name)
        return name, path
