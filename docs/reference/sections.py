"""Docstrings in the form that the documentation site reads: sections, such as ``Returns:`` and
``Example::``, after an empty line and with their text on lines of its own, and a section of the
options that a dataclass explains in the metadata of its fields.
"""

from __future__ import annotations

import dataclasses
import importlib
import re
from typing import Any

import griffe

HEADING = re.compile(
    r"^(Args|Attributes|Returns|Raises|Note|Source|Example):{1,2}(?: +(.*))?\n+", re.MULTILINE
)
NAMES = {"Example": "Examples"}  # griffe's name of the section


class Sections(griffe.Extension):
    """Separate the sections of every docstring."""

    def on_object(self, *, obj: Any, **_: Any) -> None:
        """Rewrite the docstring of a module, class, function or attribute."""
        if obj.docstring is None:
            return

        def separate(match: re.Match[str]) -> str:
            text = f"    {match[2]}\n" if match[2] else ""
            return f"\n{NAMES.get(match[1], match[1])}:\n{text}"

        obj.docstring.value = HEADING.sub(separate, obj.docstring.value) + _options(obj)


def _options(obj: Any) -> str:
    """Return the section of the options of a dataclass of this project; empty without any."""
    if "dataclass" not in obj.labels:
        return ""
    kind = getattr(importlib.import_module(obj.module.path), obj.name)
    own = [
        field
        for base in kind.__mro__
        if base.__module__.startswith("realign")
        for field in dataclasses.fields(base)
        if field.name in vars(base).get("__annotations__", {}) and "help" in field.metadata
    ]
    lines = [f"    {field.name}: {_sentence(field.metadata['help'])}\n" for field in own]
    return "".join(["\n\nAttributes:\n", *lines]) if own else ""


def _sentence(text: str) -> str:
    return f"{text[0].upper()}{text[1:]}."
