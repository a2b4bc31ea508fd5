"""Write self-contained HTML pages, which load no other file."""

from __future__ import annotations

import base64
import hashlib
import io
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from jinja2 import Environment, FileSystemLoader, StrictUndefined, Template

from realign.data.images import decode_image
from realign.data.records import Record
from realign.errors import RefusedError
from realign.review.pair_view import PairView
from realign.runtime.files import write_text

HERE = Path(__file__).parent
SHARED = HERE / "templates"
SIDE = 264  # pixels of a thumbnail; shown at half this size, to be sharp on dense screens
Picture = dict[str, str]
Tile = dict[str, str | Sequence[str]]


def write_page(out: Path, template: str, values: Mapping[str, Any], script: str = "") -> Path:
    """Render a template of this folder into a self-contained file.

    The page's content security policy forbids every request and every script but ``script``, so
    that no text of a dataset can run as a script.

    Args:
        out: File to write.
        template: File name of the template.
        values: Values of the template; strings are escaped.
        script: File name of the page's script, if it has one.
    """
    code = (HERE / script).read_text(encoding="utf-8") if script else ""
    digest = base64.b64encode(hashlib.sha256(code.encode()).digest()).decode()
    allowed = f"'sha256-{digest}'" if script else "'none'"
    policy = (
        "default-src 'none'; img-src data:; style-src 'unsafe-inline'; base-uri 'none'; "
        f"form-action 'none'; script-src {allowed}"
    )
    page = {"policy": policy, "script": code, **values}
    write_text(out, load_template(template, HERE).render(page))
    return out


def load_template(name: str, folder: Path) -> Template:
    """Load a template that escapes its values and may include the shared templates.

    Args:
        name: File name of the template.
        folder: Folder of the template.
    """
    environment = Environment(
        loader=FileSystemLoader([folder, SHARED]),
        autoescape=True,
        undefined=StrictUndefined,
        trim_blocks=True,
    )
    return environment.get_template(name)


def tile(value: str, label: str, interval: Sequence[str] = (), verdict: str = "") -> Tile:
    """Return the values of a tile of the template ``tiles.html.j2``.

    Args:
        value: Number to show in the largest type.
        label: Name of the number.
        interval: Confidence interval or spread, in pieces within which no line breaks.
        verdict: Outcome of a comparison.
    """
    return {"value": value, "label": label, "interval": interval, "verdict": verdict}


def shown_pair(record: Record) -> dict[str, object]:
    """Return the values of the template ``pair.html.j2``."""
    return {
        "view": PairView.of(record),
        "original": _picture(record.images, f"{record.where}, images"),
        "retrieved": _picture(record.rejected_images, f"{record.where}, rejected_images"),
    }


def _picture(images: Sequence[bytes], where: str) -> Picture | None:
    if not images:
        return None
    try:
        return {"src": data_uri(images[0], where), "full": "", "problem": ""}
    except RefusedError as error:
        return {"src": "", "full": "", "problem": str(error)}


def spread(records: Sequence[Record], count: int) -> list[Record]:
    """Return evenly spaced records, which represent the file better than its first ones."""
    count = min(count, len(records))
    return [records[i * len(records) // count] for i in range(count)]


def thumbnail(raw: bytes, where: str, side: int = SIDE) -> bytes:
    """Return WebP bytes of an image reduced to at most ``side`` pixels.

    Raises:
        RefusedError: The image is damaged, too large or of another format; the message names
            ``where``.
    """
    image = decode_image(raw, where)
    image.thumbnail((side, side))
    buffer = io.BytesIO()
    image.save(buffer, "WEBP", quality=80)
    return buffer.getvalue()


def data_uri(raw: bytes, where: str, side: int = SIDE) -> str:
    """Return a thumbnail as a data URI, to embed it in a page."""
    return "data:image/webp;base64," + base64.b64encode(thumbnail(raw, where, side)).decode()
