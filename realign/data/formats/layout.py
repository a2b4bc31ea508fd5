"""What a layout of rows is: how it is recognised, and what it makes of one row."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, field
from typing import Any, Literal

from realign.data.records import Message
from realign.errors import RefusedError

Turns = Literal["first", "last", "each"]
RawRow = dict[str, Any]


class RefusedRowError(RefusedError):
    """One row cannot be used; the others can.

    Args:
        field: What of the row is wrong; empty for the whole row.
        code: Short name of the kind of problem, stable across releases.
        text: The rule, the value and the remedy; whoever knows the row puts its place before it.
    """

    def __init__(self, field: str, code: str, text: str) -> None:
        super().__init__(text)
        self.field, self.code = field, code


@dataclass(frozen=True)
class Draft:
    """One instruction of a row, its layout gone, its texts and image still unchecked.

    Attributes:
        image: A file name, or ``{"bytes", "path"}`` of an image column.
        prompt: Turns before the answer, without image placeholders.
        answer: Empty where it is still to be asked for.
        rejected: Empty where it is still to be induced.
        turn: Which answer of its conversation, from 1; 0 where a row gives one instruction.
        source: Names that the row gives, for provenance.
    """

    image: Any
    prompt: tuple[Message, ...]
    answer: str = ""
    rejected: str = ""
    turn: int = 0
    source: dict[str, Any] = field(default_factory=dict)


@dataclass(frozen=True)
class Layout:
    """One family of rows.

    Attributes:
        name: What ``format`` names it.
        summary: Its keys and who publishes such rows, for the announcement.
        keys: Keys that are understood; the others are kept beside the row.
        matches: Whether a row looks like it.
        drafts: The instructions of a row; raises :class:`RefusedRowError`.
        ids_repeat: Whether rows may share an id, as the conversations about one image do in LLaVA.
        note: What a user should know about how it is read.
    """

    name: str
    summary: str
    keys: frozenset[str]
    matches: Callable[[Mapping[str, Any]], bool]
    drafts: Callable[[RawRow, Turns], Iterable[Draft]]
    ids_repeat: bool = True
    note: str = ""


def text_of(row: Mapping[str, Any], name: str, *, needed: bool = True) -> str:
    """A string of a row, stripped; empty where it is missing and not needed.

    Raises:
        RefusedRowError: It is no string, or it is needed and empty.
    """
    value = row.get(name)
    if value is None and not needed:
        return ""
    if isinstance(value, str) and (value.strip() or not needed):
        return value.strip()
    code = "empty" if isinstance(value, str) else "wrong-type"
    raise RefusedRowError(
        name,
        "missing-key" if value is None else code,
        f"{name} must be a non-empty string, got {shown(value, row, name)}. Fill it in or remove "
        "the row.",
    )


def shown(value: Any, row: Mapping[str, Any], name: str) -> str:
    """A value for a message; of a key that is not there, the keys that are."""
    return f"{value!r:.80}" if name in row else f"none among {sorted(map(str, row))[:12]}"


def image_of(row: Mapping[str, Any]) -> Any:
    """The one image of a row, under ``image`` or ``images``.

    Raises:
        RefusedRowError: There is none, or more than one.
    """
    name = "images" if row.get("image") is None and "images" in row else "image"
    value = row.get(name)
    images = value if isinstance(value, list) else [] if value is None else [value]
    if not images:
        raise RefusedRowError(
            name,
            "missing-key",
            f"{name} must be one image, got {shown(value, row, name)}. Name a file of the image "
            "folder or remove the row.",
        )
    if len(images) > 1:
        raise RefusedRowError(
            name,
            "image-count",
            f"{name} must be one image, got {len(images)}. Split the row or remove it.",
        )
    return images[0]
