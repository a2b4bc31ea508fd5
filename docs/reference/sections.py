"""The sections of docstrings, such as ``Returns:`` and ``Example::``, in the form that the
documentation site reads: after an empty line, and with their text on lines of its own.
"""

from __future__ import annotations

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

        obj.docstring.value = HEADING.sub(separate, obj.docstring.value)
