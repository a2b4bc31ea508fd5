"""Sources like those of users: small files that are written here, with real images."""

from __future__ import annotations

import io
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from PIL import Image

from realign.data.formats.read_source import Source, read_source


def jpeg(grey: int) -> bytes:
    """A small image, each grey another one."""
    buffer = io.BytesIO()
    Image.new("RGB", (8, 8), (grey, grey, grey)).save(buffer, "JPEG")
    return buffer.getvalue()


@pytest.fixture
def images(tmp_path: Path) -> Path:
    """A folder with a.jpg, b.jpg, c.jpg and sub/d.jpg."""
    folder = tmp_path / "images"
    (folder / "sub").mkdir(parents=True)
    for grey, name in enumerate(("a", "b", "c", "sub/d")):
        (folder / f"{name}.jpg").write_bytes(jpeg(40 * grey))
    return folder


@pytest.fixture
def read(tmp_path: Path, images: Path) -> Callable[..., Source]:
    """Write rows as JSON lines, or as one list, and read them as a source."""

    def write_and_read(rows: list[Any], *, as_list: bool = False, **options: Any) -> Source:
        path = tmp_path / ("source.json" if as_list else "source.jsonl")
        lines = [json.dumps(row) for row in rows]
        path.write_text(json.dumps(rows, indent=1) if as_list else "\n".join(lines) + "\n")
        return read_source(path, images, **options)

    return write_and_read
