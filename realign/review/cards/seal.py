"""Cards that show whether a person has edited them: the last line of a card by ``realign card``
holds the hash of the text above it.
"""

from __future__ import annotations

import re
from pathlib import Path

from realign.errors import RefusedError
from realign.runtime.files import content_sha256, read_utf8, write_text

_SEAL = re.compile(r"<!-- Written by realign card, SHA-256 of the text above: (\w+) -->\n\Z")


def write_sealed(path: Path, text: str) -> None:
    """Write a card with its seal, whole or not at all."""
    text = text.rstrip("\n") + "\n\n"
    digest = content_sha256(text)
    line = f"<!-- Written by realign card, SHA-256 of the text above: {digest} -->\n"
    write_text(path, text + line)


def check_replaceable(path: Path, *, overwrite: bool) -> None:
    """Refuse to replace a card that holds the work of a person or of another program.

    Args:
        path: File of the card.
        overwrite: Whether such a card may be replaced nevertheless.
    Raises:
        RefusedError: The card has no hash that matches its text, or a folder has its name.
    """
    if path.is_dir():
        raise RefusedError(f"{path} must be a file, got a folder. Move it away.")
    if overwrite or not path.exists():
        return
    text = read_utf8(path)
    found = _SEAL.search(text)
    if found is None or found[1] != content_sha256(text[: found.start()]):
        raise RefusedError(
            f"{path} must be as `realign card` wrote it to be replaced, got one that was edited or "
            "written by somebody else. Pass --overwrite to replace it."
        )
