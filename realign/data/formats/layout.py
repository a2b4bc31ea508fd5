"""Layouts of rows: how one is recognised, and how its rows are read."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, field
from typing import Any, Literal

from realign.data.records import Message
from realign.errors import RefusedError

Turns = Literal["first", "last", "each"]
RawRow = dict[str, Any]


class RefusedRowError(RefusedError):
    """Refusal of one row; other rows can be used.

    Args:
        field: Field of the row that is wrong; empty for the whole row.
        code: Short name of the kind of problem, stable across releases.
        text: The rule, the value and the remedy, without the place of the row, which :meth:`at`
            adds.
        missing: Name of an image that does not exist, as the row gives it.
    """

    def __init__(self, field: str, code: str, text: str, missing: str = "") -> None:
        super().__init__(text, code=code, field=field, missing=missing)

    def at(self, place: str) -> RefusedError:
        """Return an error whose message begins with the row's place."""
        message = f"{place}: {self}"
        return RefusedError(message, code=self.code, field=self.field, missing=self.missing)


@dataclass(frozen=True)
class Draft:
    """One instruction of a row in the common form; its texts are unchecked and unchanged.

    Attributes:
        prompt: Turns before the answer, without image placeholders.
        answer: The good answer; empty if it is still to be generated.
        rejected: The bad answer; empty if it is still to be induced.
        turn: Number of the answer in its conversation, from 1; 0 if the row has one instruction.
        source: Names of files in the row, for provenance.
    """

    prompt: tuple[Message, ...]
    answer: str = ""
    rejected: str = ""
    turn: int = 0
    source: dict[str, Any] = field(default_factory=dict)


@dataclass(frozen=True)
class Layout:
    """A layout of rows.

    Attributes:
        name: Name of the layout, as a value of ``format``.
        summary: Its keys and who publishes such rows, for messages.
        keys: Keys that are read; others are kept beside the row.
        matches: Function that tells whether a row seems to have the layout.
        drafts: Function that returns the instructions of a row, given its number of images; raises
            :class:`RefusedRowError`.
        images: Function that returns the images of a row: file names, or ``{"bytes", "path"}`` of
            an image column.
        ids_repeat: Whether rows may share an id, as the conversations about one image do in LLaVA.
    """

    name: str
    summary: str
    keys: frozenset[str]
    matches: Callable[[Mapping[str, Any]], bool]
    drafts: Callable[[RawRow, Turns, int], Iterable[Draft]]
    images: Callable[[RawRow], list[Any]] = lambda row: images_of(row)
    ids_repeat: bool = True


def text_of(row: Mapping[str, Any], name: str, *, needed: bool = True) -> str:
    """Return a text of a row; empty if it is missing and not ``needed``.

    Raises:
        RefusedRowError: The value is not a string, or it is needed and empty.
    """
    value = row.get(name)
    if value is None and not needed:
        return ""
    if isinstance(value, str) and (value.strip() or not needed):
        return value
    code = "empty" if isinstance(value, str) else "wrong-type"
    raise RefusedRowError(
        name,
        "missing-key" if value is None else code,
        f"{name} must be a non-empty string, got {shown(value, row, name)}. Fill it in or remove "
        "the row.",
    )


def shown(value: Any, row: Mapping[str, Any], name: str) -> str:
    """Return a value for a message or, if the key is missing, the keys of the row."""
    return f"{value!r:.80}" if name in row else f"none among {sorted(map(str, row))[:12]}"


def images_of(row: Mapping[str, Any]) -> list[Any]:
    """Return the images of a row, under ``image`` or ``images``."""
    return _as_list(row.get("images") if row.get("image") is None else row["image"])


def retrieved_of(row: Mapping[str, Any]) -> list[Any]:
    """Return the retrieved images of a row, under ``rejected_images`` or ``retrieved_image``."""
    retrieved = row.get("retrieved_image")
    return _as_list(row.get("rejected_images") if retrieved is None else retrieved)


def is_image_pair(draft: Draft, row: Mapping[str, Any]) -> bool:
    """Return whether a row compares two images under one answer, as in ms-swift."""
    has_answer_pair = draft.rejected.strip() not in ("", draft.answer.strip())
    return bool(retrieved_of(row)) and not has_answer_pair


def lone_image_pair() -> RefusedRowError:
    """Return the refusal of an image pair without its answer pair."""
    return RefusedRowError(
        "rejected_images",
        "image-pair",
        "rejected_images must stand beside a rejected answer, or beside a row of the same images "
        "and messages that has one, got an image pair alone. Add the rejected answer or remove "
        "the row.",
    )


def _as_list(value: Any) -> list[Any]:
    return value if isinstance(value, list) else [] if value is None else [value]
