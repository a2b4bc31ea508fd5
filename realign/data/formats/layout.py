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
        missing: Name of an image that does not exist, as the row gives it.
    """

    def __init__(self, field: str, code: str, text: str, missing: str = "") -> None:
        super().__init__(text, code=code, field=field, missing=missing)

    def at(self, place: str) -> RefusedError:
        """The refusal as it is said of a whole file: with the row's place in front."""
        said = f"{place}: {self}"
        return RefusedError(said, code=self.code, field=self.field, missing=self.missing)


@dataclass(frozen=True)
class Draft:
    """One instruction of a row, its layout gone, its texts still unchecked and as they are.

    Attributes:
        prompt: Turns before the answer, without image placeholders.
        answer: Empty where it is still to be asked for.
        rejected: Empty where it is still to be induced.
        turn: Which answer of its conversation, from 1; 0 where a row gives one instruction.
        source: Names that the row gives, for provenance.
    """

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
        drafts: The instructions of a row, given how many images it has; raises
            :class:`RefusedRowError`.
        images: The images of a row: file names, or ``{"bytes", "path"}`` of an image column.
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
    """A string of a row; empty where it is missing and not needed.

    Raises:
        RefusedRowError: It is no string, or it is needed and empty.
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
    """A value for a message; of a key that is not there, the keys that are."""
    return f"{value!r:.80}" if name in row else f"none among {sorted(map(str, row))[:12]}"


def images_of(row: Mapping[str, Any]) -> list[Any]:
    """The images of a row, under ``image`` or ``images``."""
    return _as_list(row.get("images") if row.get("image") is None else row["image"])


def retrieved_of(row: Mapping[str, Any]) -> list[Any]:
    """The retrieved images of a row, under ``rejected_images`` or ``retrieved_image``."""
    retrieved = row.get("retrieved_image")
    return _as_list(row.get("rejected_images") if retrieved is None else retrieved)


def is_image_pair(draft: Draft, row: Mapping[str, Any]) -> bool:
    """Return whether a row compares two images under one answer, as in ms-swift."""
    has_answer_pair = draft.rejected.strip() not in ("", draft.answer.strip())
    return bool(retrieved_of(row)) and not has_answer_pair


def lone_image_pair() -> RefusedRowError:
    """The refusal of an image pair whose answer pair is nowhere."""
    return RefusedRowError(
        "rejected_images",
        "image-pair",
        "rejected_images must stand beside a rejected answer, or beside a row of the same images "
        "and messages that has one, got an image pair alone. Add the rejected answer or remove "
        "the row.",
    )


def _as_list(value: Any) -> list[Any]:
    return value if isinstance(value, list) else [] if value is None else [value]
