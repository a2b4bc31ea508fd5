"""Preference records, identified by their content, and checks of their content."""

from __future__ import annotations

import re
import unicodedata
from abc import abstractmethod
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, field, fields
from functools import cached_property
from typing import Any, overload

from PIL import Image

from realign.data.images import RefusedImage, decode_image
from realign.errors import RefusedError
from realign.runtime.files import canonical_json, content_sha256

Message = dict[str, str]  # {"role": ..., "content": ...}
COUNTED = " (counting from 1)"  # after the number of a row that has no id
IMAGE_TOKEN = "<image>"  # placeholder of an image in the authors' JSON


@dataclass(frozen=True)
class Problem:
    """One reason to refuse one row.

    Attributes:
        row: The row's id, or its number from 1 if it has none.
        place: File and line or row, for messages.
        field: Field of the row that is wrong: ``image``, ``chosen``, ...; empty for the whole row.
        code: Short name of the kind of problem, such as ``empty``; stable across releases.
        message: Place, value and remedy, as a sentence for people.
        missing: Name of an image that does not exist; empty for other problems.
    """

    row: str
    place: str
    field: str
    code: str
    message: str
    missing: str = ""

    @classmethod
    def of(cls, error: RefusedError, row: str, place: str) -> Problem:
        """Return the problem that an error about a row describes."""
        return cls(row, place, error.field, error.code, str(error), error.missing)


@dataclass(frozen=True)
class Record:
    """One dual-preference pair.

    Attributes:
        id: Any string; names the row in messages and provenance.
        images: Bytes of the original image files.
        prompt: Turns before the answer, with string contents and without image placeholders.
        chosen: The preferred answer y_w.
        rejected: The induced answer y_l.
        rejected_images: Bytes of the retrieved image files v_l; empty if there is no image pair.
        meta: Provenance; anything JSON can hold.
        place: The row's file and place in it, for messages; not part of its content.

    Example::

        >>> from pathlib import Path
        >>> from realign import Record
        >>> image = Path("photo.png").read_bytes()
        >>> prompt = ({"role": "user", "content": "What is in the image?"},)
        >>> Record("1", (image,), prompt, chosen="A red house.", rejected="A dog.").chosen
        'A red house.'
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
        """SHA-256 of the row's content, on which its reference log-probabilities depend."""
        return content_sha256(
            canonical_json([list(self.prompt), self.chosen, self.rejected]),
            *map(content_sha256, self.images),
            "rejected",
            *map(content_sha256, self.rejected_images),
        )

    @property
    def where(self) -> str:
        """Name of the row in messages."""
        return self.place or f"row {self.id}"

    @property
    def source(self) -> dict[str, Any]:
        """Names of the row's source files, if its provenance holds them."""
        source = self.meta.get("source")
        return source if isinstance(source, dict) else {}

    def open_images(self, *, rejected: bool = False) -> list[Image.Image]:
        """Decode the original or the retrieved images to RGB."""
        files = self.rejected_images if rejected else self.images
        return [decode_image(raw, self.image_place(rejected=rejected)) for raw in files]

    def image_place(self, *, rejected: bool) -> str:
        """Return the name of the original or the retrieved images, for messages."""
        file = self.source.get("retrieved_image" if rejected else "image")
        name = "rejected_images" if rejected else "images"
        return f"{self.where}, {name}" + (f" {file!r}" if file else "")


@dataclass(frozen=True)
class OpenedRecord(Record):
    """A record whose images are decoded once and kept while it is in use."""

    original: Record | None = None

    @classmethod
    def of(cls, record: Record) -> OpenedRecord:
        """Return an opened record of ``record``, which may be one already."""
        if isinstance(record, OpenedRecord):
            return record
        values = {field.name: getattr(record, field.name) for field in fields(Record)}
        return cls(**values, original=record)

    @cached_property
    def key(self) -> str:
        """Hash of the record's content."""
        assert self.original is not None
        return self.original.key

    def open_images(self, *, rejected: bool = False) -> list[Image.Image]:
        """Return the original or the retrieved images as RGB."""
        return self._rejected_pixels if rejected else self._pixels

    @cached_property
    def _pixels(self) -> list[Image.Image]:
        return super().open_images()

    @cached_property
    def _rejected_pixels(self) -> list[Image.Image]:
        return super().open_images(rejected=True)


class LazyRecords(Sequence[Record]):
    """Records that are read on access, so that a dataset need not fit into memory."""

    @abstractmethod
    def _read(self, index: int) -> Record:
        """Read the row at ``index``, which is in range and not negative."""

    @overload
    def __getitem__(self, index: int) -> Record: ...
    @overload
    def __getitem__(self, index: slice) -> list[Record]: ...
    def __getitem__(self, index: int | slice) -> Record | list[Record]:
        numbers = range(len(self))[index]  # wraps and raises as a list does
        return self._read(numbers) if isinstance(numbers, int) else [*map(self._read, numbers)]

    def texts(self) -> Sequence[Record]:
        """Return the same rows without their images; their ``key`` is therefore another one."""
        return self


def texts_of(records: Sequence[Record]) -> Sequence[Record]:
    """Return the rows without their images, if these can be left on the disk."""
    return records.texts() if isinstance(records, LazyRecords) else records


def special_tokens(placeholders: Iterable[str]) -> list[str]:
    """Return the texts that no row may contain: a model's tokens and the authors' placeholder."""
    return sorted({token for token in (*placeholders, IMAGE_TOKEN) if token})


def content_problems(record: Record, special: Sequence[str]) -> Iterator[Problem]:
    """Yield the problems of a row, without decoding its images.

    Codes: ``empty``, ``special-token``, ``equal-answers``, ``image-slot``, ``image-count``,
    ``equal-images``.

    Args:
        record: The row.
        special: Tokens that no text may contain, from :func:`special_tokens`.
    """

    def problem(field: str, code: str, message: str) -> Problem:
        return Problem(record.id, record.where, field, code, f"{record.where}: {message}")

    for name in ("chosen", "rejected"):
        text = getattr(record, name)
        if not text.strip():
            yield problem(name, "empty", f"{name} must not be empty, got {text!r}. Remove the row.")
    texts = [("chosen", record.chosen), ("rejected", record.rejected)]
    texts += [("prompt", message["content"]) for message in record.prompt]
    for name, text in texts:
        for token in special:
            if token in text:
                value = f"got {surroundings(text, token)!r}. {token_remedy(name, text, token)}"
                message = f"{name} must not contain the special token {token!r}, {value}"
                yield problem(name, "special-token", message)
    chosen, rejected = _normalised(record.chosen), _normalised(record.rejected)
    if chosen and chosen == rejected:
        value = f"got {record.chosen[:80]!r} twice. Remove the row."
        yield problem("rejected", "equal-answers", f"rejected must differ from chosen, {value}")
    if record.images and not any(message["role"] == "user" for message in record.prompt):
        roles = [message["role"] for message in record.prompt]
        value = f"got {roles}. Add it or remove the images."
        message = f"prompt must have a user turn for the image, {value}"
        yield problem("prompt", "image-slot", message)
    if record.rejected_images and len(record.rejected_images) != len(record.images):
        value = f"got {len(record.rejected_images)} for {len(record.images)}. Add or remove some."
        message = f"rejected_images must be as many as images, or none, {value}"
        yield problem("rejected_images", "image-count", message)
    if record.rejected_images and record.rejected_images == record.images:
        value = f"got the same file content{_image_names(record)}. "
        remedy = "Retrieve another image or remove the row."
        message = f"retrieved_image must differ from image, {value}{remedy}"
        yield problem("rejected_images", "equal-images", message)


def image_problem(record: Record, error: RefusedImage, *, rejected: bool) -> Problem:
    """Return the problem for a refusal of one of the row's images."""
    field = "rejected_images" if rejected else "images"
    message = str(error.at(record.image_place(rejected=rejected)))
    return Problem(record.id, record.where, field, error.code, message)


def _normalised(text: str) -> str:
    """Return a text with normalised whitespace and Unicode forms."""
    return " ".join(unicodedata.normalize("NFC", text).split())


def token_remedy(name: str, text: str, token: str) -> str:
    """Return the remedy for a special token in a text, which depends on the token's purpose."""
    if re.search("image|img|vision", token, re.IGNORECASE):
        return "Remove it; the image is put before the prompt automatically."
    if name != "prompt" and text.rstrip().endswith(token):
        return "Remove it; the chat template ends the answer automatically."
    return "Remove it from the text."


def surroundings(text: str, token: str) -> str:
    """Return the part of a text around a token, for messages."""
    start = text.index(token)
    first, last = max(0, start - 30), start + len(token) + 30
    return ("..." if first else "") + text[first:last] + ("..." if last < len(text) else "")


def _image_names(record: Record) -> str:
    names = [record.source.get(name) for name in ("image", "retrieved_image")]
    return f" ({names[0]!r} and {names[1]!r})" if any(names) else ""


def check_messages(turns: Any, where: str, name: str) -> tuple[Message, ...]:
    """Return messages after checking that each has a role and a string content."""
    if not isinstance(turns, list) or not all(
        isinstance(turn, dict)
        and isinstance(turn.get("role"), str)
        and isinstance(turn.get("content"), str)
        for turn in turns
    ):
        raise RefusedError(
            f"{where}: {name} must be a list of messages with a role and a string content, "
            f"got {turns!r:.120}. Put the text itself into content.",
            code="messages",
            field=name,
        )
    return tuple(turns)
