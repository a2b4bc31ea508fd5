"""Preference records: what they are and what is refused. Image bytes travel undecoded; rows are
known by their content.
"""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from typing import Any, overload

from PIL import Image

from realign.errors import RefusedError
from realign.files import canonical_json, content_sha256
from realign.images import decode_image

Message = dict[str, str]  # {"role": ..., "content": ...}
COUNTED = " (counting from 1)"  # after the number of a row that has no id
IMAGE_TOKEN = "<image>"  # how the authors' JSON says where the image goes


@dataclass(frozen=True)
class Record:
    """One dual-preference pair.

    Attributes:
        id: Names the row in messages and provenance; any string.
        images: Bytes of the original image files.
        prompt: Turns before the answer, string contents, without image placeholders.
        chosen: The preferred answer y_w.
        rejected: The induced answer y_l.
        rejected_images: Bytes of the retrieved image files v_l; empty when there is no image pair.
        meta: Provenance; anything JSON can hold.
        place: The row's file and place in it, for messages; no part of what the row is.
    """

    id: str
    images: tuple[bytes, ...]
    prompt: tuple[Message, ...]
    chosen: str
    rejected: str
    rejected_images: tuple[bytes, ...] = ()
    meta: dict[str, Any] = field(default_factory=dict)
    place: str = field(default="", compare=False)

    @cached_property
    def key(self) -> str:
        """SHA-256 of everything that a reference log-probability depends on in the row, and of
        nothing else.
        """
        return content_sha256(
            canonical_json([list(self.prompt), self.chosen, self.rejected]),
            *map(content_sha256, self.images),
            "rejected",
            *map(content_sha256, self.rejected_images),
        )

    @property
    def where(self) -> str:
        """What a message calls the row."""
        return self.place or f"row {self.id}"

    @property
    def source(self) -> dict[str, Any]:
        """Names of the files that the row was made from, where its provenance holds them."""
        source = self.meta.get("source")
        return source if isinstance(source, dict) else {}

    def open_images(self, *, rejected: bool = False) -> list[Image.Image]:
        """Decode the original or the retrieved images to RGB."""
        which, name = (
            (self.rejected_images, "rejected_images") if rejected else (self.images, "images")
        )
        file = self.source.get("retrieved_image" if rejected else "image")
        where = f"{self.where}, {name}" + (f" {file!r}" if file else "")
        return [decode_image(raw, where) for raw in which]


class LazyRecords(Sequence[Record]):
    """Records that are read when they are asked for: a dataset need not fit into memory."""

    @abstractmethod
    def _read(self, index: int) -> Record:
        """Read row ``index``, which is in range and not negative."""

    @overload
    def __getitem__(self, index: int) -> Record: ...
    @overload
    def __getitem__(self, index: slice) -> list[Record]: ...
    def __getitem__(self, index: int | slice) -> Record | list[Record]:
        numbers = range(len(self))[index]  # wraps and raises as a list does
        return self._read(numbers) if isinstance(numbers, int) else [*map(self._read, numbers)]

    def texts(self) -> Sequence[Record]:
        """The same rows without the bytes of their images, which are most of a dataset. Their
        ``key`` is not the rows' own.
        """
        return self


def texts_of(records: Sequence[Record]) -> Sequence[Record]:
    """The rows for looking through them, their images left on the disk where they are there."""
    return records.texts() if isinstance(records, LazyRecords) else records


def check_records(records: Sequence[Record], placeholders: Iterable[str]) -> None:
    """Refuse what would train on nothing or on the wrong thing, before anything is loaded.

    Args:
        records: The rows.
        placeholders: Image and other special tokens of the model; an answer must contain none.
    Raises:
        RefusedError: The first bad rows, one a line, each with its id, the value and the remedy.
    """
    special = sorted({token for token in (*placeholders, IMAGE_TOKEN) if token})
    problems = [problem for record in records for problem in _problems(record, special)]
    refuse_problems(problems, len(records))
    if not records:
        raise RefusedError(
            "data must have at least one row, got none. Add rows or give another --data."
        )


def refuse_problems(problems: Sequence[str], num_rows: int) -> None:
    """Refuse what was found in a dataset, if anything: all counted, the first twenty shown.

    Raises:
        RefusedError: There is a problem.
    """
    if problems:
        shown = "\n".join(problems[:20])
        more = f"\n... and {len(problems) - 20} more." if len(problems) > 20 else ""
        raise RefusedError(f"{len(problems)} problem(s) in {num_rows} rows:\n{shown}{more}")


def _problems(record: Record, special: list[str]) -> Iterable[str]:
    where = record.where
    for name in ("chosen", "rejected"):
        text = getattr(record, name)
        if not text.strip():
            yield f"{where}: {name} must not be empty, got {text!r}. Remove the row."
        for token in special:
            if token in text:
                yield (
                    f"{where}: {name} must not contain the special token {token!r}, "
                    f"got {surroundings(text, token)!r}. Remove it."
                )
    if record.chosen.strip() and record.chosen.strip() == record.rejected.strip():
        yield (
            f"{where}: rejected must differ from chosen, got {record.chosen[:80]!r} twice. "
            "Remove the row."
        )
    for message in record.prompt:
        for token in special:
            if token in message["content"]:
                yield (
                    f"{where}: prompt must not contain the special token {token!r}, "
                    f"got {surroundings(message['content'], token)!r}. Remove it from the text."
                )
    if record.rejected_images and len(record.rejected_images) != len(record.images):
        yield (
            f"{where}: rejected_images must be as many as images, or none, got "
            f"{len(record.rejected_images)} for {len(record.images)}. Add or remove some."
        )
    if record.rejected_images and record.rejected_images == record.images:
        yield (
            f"{where}: retrieved_image must differ from image, got the same file content "
            f"({_image_names(record)}). Retrieve another image or remove the row."
        )
    for rejected in (False, True):
        try:
            record.open_images(rejected=rejected)
        except RefusedError as error:
            yield str(error)


def surroundings(text: str, token: str) -> str:
    """The part of a text around a token, for messages."""
    start = text.index(token)
    first, last = max(0, start - 30), start + len(token) + 30
    return ("..." if first else "") + text[first:last] + ("..." if last < len(text) else "")


def _image_names(record: Record) -> str:
    return f"{record.source.get('image')!r} and {record.source.get('retrieved_image')!r}"


def check_messages(turns: Any, where: str, name: str) -> tuple[Message, ...]:
    """Messages whose contents are plain strings; anything else would be trained on as its repr."""
    if not isinstance(turns, list) or not all(
        isinstance(turn, dict)
        and isinstance(turn.get("role"), str)
        and isinstance(turn.get("content"), str)
        for turn in turns
    ):
        raise RefusedError(
            f"{where}: {name} must be a list of messages with a role and a string content, "
            f"got {turns!r:.120}. Put the text itself into content."
        )
    return tuple(turns)
