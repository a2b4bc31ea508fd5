"""Which layouts are known, and which one a source has."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

from realign.data.formats.chat_pairs import LLAMAFACTORY, OFFICIAL, SWIFT, TRL
from realign.data.formats.layout import Layout
from realign.data.formats.llava import LLAVA, POVID
from realign.data.formats.prompted import PROMPTED
from realign.data.formats.text_pairs import MDPO, QUESTION, RLHF_V
from realign.errors import RefusedError

# the first that matches: those with a key of their own stand before those with fewer
LAYOUTS = (MDPO, POVID, QUESTION, RLHF_V, LLAMAFACTORY, OFFICIAL, TRL, SWIFT, LLAVA, PROMPTED)
FORMATS = {layout.name: layout for layout in LAYOUTS}


def recognise(rows: Iterable[Any], format: str | None, source: str) -> Layout:
    """The layout that the first rows have, or the one that is asked for.

    Args:
        rows: The first rows; the first one that has a layout decides.
        format: Name of a layout; None to look at the rows.
        source: What a message calls the file.
    Raises:
        RefusedError: The name is unknown, or no row has a known layout.
    """
    if format is not None:
        if format not in FORMATS:
            raise RefusedError(
                f"format must be one of {sorted(FORMATS)}, got {format!r}. Correct it."
            )
        return FORMATS[format]
    seen = [row for row in rows if isinstance(row, dict)]
    for row in seen:
        for layout in LAYOUTS:
            if layout.matches(row):
                return layout
    known = "\n".join(f"  {layout.name}: {layout.summary}" for layout in LAYOUTS)
    keys = (
        f"rows with keys {sorted(map(str, seen[0]))[:12]}" if seen else "no row that is an object"
    )
    raise RefusedError(
        f"source must have rows of a known layout, got {keys} in {source}. Rename their keys to "
        f"one of these, or name the layout by --format:\n{known}"
    )
