"""The file name suffix that image bytes deserve."""

from __future__ import annotations


def image_suffix(raw: bytes) -> str | None:
    """The suffix of a JPEG, PNG or WebP file by how its bytes begin; None for anything else."""
    if raw.startswith(b"\xff\xd8\xff"):
        return ".jpg"
    if raw.startswith(b"\x89PNG\r\n\x1a\n"):
        return ".png"
    return ".webp" if raw[:4] == b"RIFF" and raw[8:12] == b"WEBP" else None
