"""The known layouts, and the recognition of a file's layout."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

from realign.data.formats.chat_pairs import LLAMAFACTORY, OFFICIAL, SWIFT, TRL
from realign.data.formats.layout import Layout
from realign.data.formats.llava import LLAVA, POVID
from realign.data.formats.prompted import PROMPTED
from realign.data.formats.text_pairs import MDPO, QUESTION, RLHF_V
from realign.errors import RefusedError

# The first layout that matches is taken, so those with more keys come first.
LAYOUTS = (MDPO, POVID, QUESTION, RLHF_V, LLAMAFACTORY, OFFICIAL, TRL, SWIFT, LLAVA, PROMPTED)
FORMATS = {layout.name: layout for layout in LAYOUTS}

# keys of datasets with several answers of models per row, which are not read
UNREAD_ANSWERS = ("completions", "responses", "candidates")


def recognise(
    rows: Iterable[Any], format: str | None, source: str, *, option: str = "source"
) -> Layout:
    """Return the layout that is named, or that of the rows.

    Args:
        rows: The first rows; the first one with a known layout decides.
        format: Name of a layout; None recognises it from the rows.
        source: Name of the file, for messages.
        option: Option that names the file, for messages; only that of a ``source`` has --format.
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
    is_source = option == "source"
    for row in seen:
        for layout in LAYOUTS:
            if layout.matches(row):
                if layout is PROMPTED:
                    _check_read(row, source, option)
                return layout
    known = "\n".join(
        f"  {layout.name}: {layout.summary}"
        for layout in LAYOUTS
        if is_source or layout is not LLAVA  # without rejected answers
    )
    keys = (
        f"rows with keys {sorted(map(str, seen[0]))[:12]}" if seen else "no row that is an object"
    )
    raise RefusedError(
        f"{option} must have rows of a known layout, got {keys} in {source}. Rename their keys to "
        f"one of these{', or name the layout by --format' * is_source}:\n{known}"
    )


def _check_read(row: dict[str, Any], source: str, option: str) -> None:
    """Refuse rows whose answers have a key that no layout reads; new ones would be generated."""
    unread = [name for name in UNREAD_ANSWERS if row.get(name)]
    if unread and not row.get("answer"):
        anew = ", or pass --format realign and build.annotator to have all prompts answered anew"
        raise RefusedError(
            f"{option} must have its answers in chosen and rejected, got rows with {unread[0]} (as "
            f"in VLFeedback) in {source}, which are not read. Convert each row to {{image, "
            "question, chosen, rejected} with a good and a bad answer"
            f"{anew * (option == 'source')}."
        )
