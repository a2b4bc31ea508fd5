"""Writing a page: a template with everything that it shows inside, and nothing else allowed."""

from __future__ import annotations

import base64
import hashlib
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from jinja2 import Environment, FileSystemLoader, StrictUndefined

from realign.files import write_text

HERE = Path(__file__).parent
SHARED = HERE.parent / "templates"


def write_page(out: Path, template: str, values: Mapping[str, Any], script: str = "") -> Path:
    """Render a template of this folder into a self-contained file.

    The page's own policy forbids every request and every script but ``script``, so that no text
    of a dataset can become one.

    Args:
        out: The page.
        template: File name.
        values: What it shows; strings are escaped.
        script: File name of its script, if it has one.
    """
    code = (HERE / script).read_text(encoding="utf-8") if script else ""
    digest = base64.b64encode(hashlib.sha256(code.encode()).digest()).decode()
    allowed = f"'sha256-{digest}'" if script else "'none'"
    policy = (
        "default-src 'none'; img-src data:; style-src 'unsafe-inline'; base-uri 'none'; "
        f"form-action 'none'; script-src {allowed}"
    )
    environment = Environment(
        loader=FileSystemLoader([HERE, SHARED]),
        autoescape=True,
        undefined=StrictUndefined,
        trim_blocks=True,
    )
    page = {"policy": policy, "script": code, **values}
    write_text(out, environment.get_template(template).render(page))
    return out
