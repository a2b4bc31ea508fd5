"""Render cards from templates, with every value escaped for Markdown."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from jinja2 import Environment, FileSystemLoader, StrictUndefined

HERE = Path(__file__).parent
UNNAMED = "REPOSITORY"  # in place of a repository's name that is not known


def render(template: str, values: Mapping[str, Any]) -> str:
    """Return the text of a template of this folder.

    Args:
        template: File name of the template.
        values: Values of the template, which passes names and texts from outside through the
            filter ``plain``, or ``code`` to show them as code.
    """
    environment = Environment(
        loader=FileSystemLoader(HERE),
        autoescape=False,  # Markdown, not HTML
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
        keep_trailing_newline=True,
    )
    environment.filters |= {"plain": plain, "code": code}
    return environment.get_template(template).render(values)


def plain(value: object) -> str:
    """Return a text as Markdown that shows it as it is, on one line, also in a table."""
    text = " ".join(str(value).split())
    return "".join(f"\\{letter}" if letter in "\\`*_[]<>|#" else letter for letter in text)


def code(value: object) -> str:
    """Return a text as Markdown code on one line, also in a table."""
    text = " ".join(str(value).split()).replace("`", "'")
    return f"`{text}`".replace("|", "\\|")
