"""Names of images in untrusted datasets, which must be files inside one folder and never URLs or
paths that leave it; and suffixes for images without a name.
"""

from __future__ import annotations

import posixpath
import re
from pathlib import Path

from realign.data.images import RefusedImage
from realign.errors import RefusedError

# a scheme and a slash, a scheme that needs none, or a host without a scheme; any case
_URL = re.compile(
    r"\s*([a-z][a-z0-9+.-]*:[/\\]|(data|file|https?|ftp|blob|javascript|urn):|[/\\]{2})", re.I
)

_DRIVE = re.compile(r"[a-z]:[/\\]", re.I)  # a Windows path, since no scheme has a single letter


def check_image_root(root: Path) -> None:
    """Refuse an image folder that does not exist, before every image is reported as missing.

    Raises:
        RefusedError: The folder does not exist.
    """
    if not root.is_dir():
        raise RefusedError(f"images must be an existing folder, got {root}. Check --images.")


def resolve_image(root: Path, name: str, where: str) -> Path:
    """Return the path of image ``name`` under ``root``.

    Args:
        root: The image folder.
        name: Relative path in the dataset. URLs, and paths that leave ``root`` directly or through
            a link, are refused.
        where: Name of the row, for the message.
    Raises:
        RefusedImage: The name is absolute, a URL, leaves the folder, or no such file exists.
    """
    if not isinstance(name, str) or not name or "\0" in name:
        reason = f"image must be a file name, got {name!r:.80}. Name a file of the image folder."
        raise RefusedImage(where, reason, "image-name")
    if _DRIVE.match(name):
        rule = f"image must lie inside {root}, got the Windows path {name[:200]!r}"
        reason = f"{rule}. Name it relative to that folder, with / between folders."
        raise RefusedImage(where, reason, "outside-root")
    if is_url(name):
        reason = f"image must be a file name, got the URL {name[:80]!r}. Download it first."
        raise RefusedImage(where, reason, "url")
    try:
        path = (root / name).resolve()
        is_inside, is_file = path.is_relative_to(root.resolve()), path.is_file()
    # too long, not in the file system's encoding, a loop of links, a folder without permission
    except (OSError, ValueError, RuntimeError) as error:
        value = f"{name[:80]!r} ({error!s:.80})"
        reason = f"image must be a file that can be opened, got {value}. Rename it."
        raise RefusedImage(where, reason, "unreadable") from None
    if not is_inside:
        by_link = ", a link that leaves it" if not is_outside_name(name) else ""
        reason = f"image must lie inside {root}, got {name[:200]!r}{by_link}. Copy it there."
        raise RefusedImage(where, reason, "outside-root")
    if not is_file:
        remedy = "Check --images or remove the row"
        if "\\" in name:
            remedy = "Write / between folders instead of \\, check --images, or remove the row"
        reason = f"image {name!r} does not exist in {root}. {remedy}."
        raise RefusedImage(where, reason, "missing", name)
    return path


def is_url(name: str) -> bool:
    """Return whether a name is a URL of any scheme; the letter of a drive is not a scheme."""
    is_scheme = _URL.match(name) is not None and _DRIVE.match(name) is None
    return "://" in name or is_scheme


def is_outside_name(name: str) -> bool:
    """Return whether a name by itself leaves its folder, links aside."""
    path = posixpath.normpath(name.replace("\\", "/"))
    return path.startswith(("/", "../")) or path == ".."


def image_suffix(raw: bytes) -> str | None:
    """Return the suffix for a JPEG, PNG or WebP file, from its first bytes; None for others."""
    if raw.startswith(b"\xff\xd8\xff"):
        return ".jpg"
    if raw.startswith(b"\x89PNG\r\n\x1a\n"):
        return ".png"
    return ".webp" if raw[:4] == b"RIFF" and raw[8:12] == b"WEBP" else None
