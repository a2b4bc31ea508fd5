"""The references of docstrings, such as ``:func:`name```, as links of the documentation site."""

from __future__ import annotations

import re
from typing import Any

import griffe

ROLE = re.compile(r":(?:attr|class|data|exc|func|meth|mod|obj):`~?([\w.]+)`")


class Roles(griffe.Extension):
    """Turn every reference into a link, or into plain code where no page shows the object."""

    def on_object(self, *, obj: Any, **_: Any) -> None:
        """Rewrite the docstring of a module, class, function or attribute."""
        if obj.docstring is None:
            return

        def link(match: re.Match[str]) -> str:
            try:
                path = obj.resolve(match[1])
            except griffe.NameResolutionError:
                path = match[1]
            return f'<autoref identifier="{path}" optional><code>{match[1]}</code></autoref>'

        obj.docstring.value = ROLE.sub(link, obj.docstring.value)
