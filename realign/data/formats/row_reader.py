"""Reader of a source's rows: texts are checked, image files found, and ids made unique."""

from __future__ import annotations

import dataclasses
import hashlib
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

from realign.data.formats.json_rows import Found
from realign.data.formats.layout import (
    Draft,
    Layout,
    RefusedRowError,
    Turns,
    is_image_pair,
    retrieved_of,
    shown,
)
from realign.data.formats.source_row import SourceRow
from realign.data.image_names import image_suffix, is_url, resolve_image
from realign.data.images import MAX_BYTES, RefusedImage, format_problem
from realign.data.records import IMAGE_TOKEN, surroundings, token_remedy
from realign.errors import RefusedError
from realign.runtime.files import json_text, write_unsynced
from realign.runtime.write_errors import explain_write_errors


class ImageFiles:
    """Finder of image files, which also writes embedded images. Each name is looked up once.

    Args:
        root: Folder of named images; None if all are embedded.
        extract_to: Folder for embedded images; None if there are none.
        file_name: File name, under the root, of an image called ``{name}``.
        extracts: Whether embedded images are written; otherwise only their names are determined.
    """

    def __init__(
        self,
        root: Path | None,
        extract_to: Path | None,
        file_name: str = "{name}",
        *,
        extracts: bool = True,
    ) -> None:
        self._extracts = extracts
        self._root, self._extract_to, self._file_name = root, extract_to, file_name
        self._named: dict[str, Path | RefusedRowError] = {}
        self._extracted: set[str] = set()

    def find(self, image: Any) -> tuple[str, Path, str | None]:
        """Return the name and the file of an image, and the source's own name if it is embedded.

        Raises:
            RefusedRowError: The file is missing, its name leaves the folder, or the bytes are not
                an image.
            RefusedError: A required folder was not given.
        """
        if isinstance(image, Mapping):
            raw = image.get("bytes")
            if isinstance(raw, bytes) and raw:
                return (*self._extract(raw), image.get("path"))
            image = image.get("path")
        if isinstance(image, bytes):
            return (*self._extract(image), None)
        if not isinstance(image, str) or not image:
            raise RefusedRowError(
                "image",
                "wrong-type",
                f"image must be a file name, got {image!r:.80}. Name a file of the image folder.",
            )
        found = self._named.get(image)
        if found is None:
            found = self._named[image] = self._resolve(image)
        if isinstance(found, RefusedRowError):
            raise found
        return image, found, None

    def _resolve(self, name: str) -> Path | RefusedRowError:
        if self._root is None and not is_url(name):
            raise RefusedError(
                f"images must name the folder of the source's images such as {name!r:.80}. Pass "
                "--images FOLDER."
            )
        try:
            # without a folder, the name is a URL, which is refused before any folder is searched
            return resolve_image(self._root or Path(), self._file_name.replace("{name}", name), "")
        except RefusedImage as error:
            missing = name if error.missing else ""
            return RefusedRowError("image", error.code, str(error).removeprefix(": "), missing)
        except (OSError, UnicodeError) as error:  # too long for a name, or half a surrogate pair
            text = f"image must be a file name, got {name!r:.80} ({error}). Rename it."
            return RefusedRowError("image", "unreadable", text)

    def _extract(self, raw: bytes) -> tuple[str, Path]:
        suffix = image_suffix(raw)
        if suffix is None:
            raise RefusedRowError("image", "format", format_problem(raw))
        if len(raw) > MAX_BYTES:
            raise RefusedRowError(
                "image",
                "too-many-bytes",
                f"image must have at most {MAX_BYTES} bytes, got {len(raw)}. Shrink it.",
            )
        if self._extract_to is None:
            raise RefusedError(
                "extract_to must name a folder for the embedded images of the source, got None. "
                "Pass one."
            )
        name = hashlib.sha256(raw).hexdigest() + suffix
        path = self._extract_to / name
        if self._extracts and name not in self._extracted:
            # images are not synced: after a power cut their bytes are compared and written again
            if not path.is_file() or path.read_bytes() != raw:
                with explain_write_errors(path):
                    self._extract_to.mkdir(parents=True, exist_ok=True)
                    write_unsynced(path, raw)
            self._extracted.add(name)
        return name, path


class UniqueIds:
    """Ids of rows, made unique: a repeated id gets a number, which is the same in every run."""

    def __init__(self) -> None:
        self._given: set[str] = set()
        self._repeated: dict[str, int] = {}

    def __contains__(self, row_id: str) -> bool:
        return row_id in self._given

    def add(self, row_id: str) -> str:
        """Return ``row_id``, with a number if it was returned before."""
        unique = row_id
        while unique in self._given:
            self._repeated[row_id] = self._repeated.get(row_id, 1) + 1
            unique = f"{row_id}#{self._repeated[row_id]}"
        self._given.add(unique)
        return unique


class RowReader:
    """Reader of rows of one layout, each with a unique id.

    Args:
        path: The source, for provenance.
        layout: Layout of the rows.
        image_root: Folder of named images.
        special: Tokens that no text may contain.
        turns: Answers of a conversation that become rows.
        extract_to: Folder for embedded images.
        image_name: File name, in the image folder, of an image called ``{name}``.
        extracts: Whether embedded images are written; otherwise only their names are determined.

    Attributes:
        left_out: Keys whose values JSON cannot hold.
        num_retrieved: Number of rows with retrieved images.
    """

    def __init__(
        self,
        path: Path,
        layout: Layout,
        image_root: Path | None,
        *,
        special: Iterable[str],
        turns: Turns,
        extract_to: Path | None,
        image_name: str,
        extracts: bool = True,
    ) -> None:
        self._file, self._layout, self._turns = path.name, layout, turns
        self._tokens = sorted({*special, IMAGE_TOKEN} - {""})
        self._images = ImageFiles(image_root, extract_to, image_name, extracts=extracts)
        self._ids = UniqueIds()
        self.left_out: set[str] = set()
        self.num_retrieved = 0

    def read(self, found: Found) -> list[SourceRow]:
        """Return the rows of one place.

        Raises:
            RefusedRowError: The place holds no usable row; the message says why.
        """
        raw = object_of(found)
        place = found.place(self._file)
        base = self._id(raw, found.number)
        image = one_image(raw, self._layout)
        drafts = [*map(_stripped, self._layout.drafts(raw, self._turns, 1))]
        extra = self._extra(raw)
        self.num_retrieved += bool(retrieved_of(raw))
        checked = [(draft, *self._check(draft, raw, image)) for draft in drafts]
        rows = []
        for draft, name, path, own_name in checked:
            source: dict[str, Any] = {"file": self._file, "index": found.number - 1}
            source |= {"format": self._layout.name, **draft.source}
            if own_name:
                source["image"] = own_name
            if "id" in raw:
                source["id"] = raw["id"]
            if draft.turn:
                source["turn"] = draft.turn
            if extra:
                source["extra"] = extra
            row_id = f"{base}-{draft.turn}" if self._turns == "each" and draft.turn else base
            is_pair = is_image_pair(draft, raw)
            rows.append(
                SourceRow(
                    # the id belongs to the answer pair, which may be in another row
                    row_id if is_pair else self._ids.add(row_id),
                    *(name, path, draft.prompt, draft.answer),
                    "" if is_pair else draft.rejected,
                    source,
                    place,
                    is_image_pair=is_pair,
                )
            )
        return rows

    def _id(self, raw: dict[str, Any], number: int) -> str:
        row_id = id_of(raw, number - 1)
        if row_id in self._ids and not self._layout.ids_repeat:
            raise RefusedRowError(
                "id",
                "duplicate-id",
                f"id must be unique, got {row_id!r:.80} again. Rename one; without an id a row is "
                "named by its number.",
            )
        return row_id

    def _check(
        self, draft: Draft, raw: Mapping[str, Any], image: Any
    ) -> tuple[str, Path, str | None]:
        for turn in draft.prompt:
            self._check_text(turn["content"], "prompt")
            if not turn["content"]:
                raise RefusedRowError(
                    "prompt",
                    "empty",
                    f"prompt must have no empty turn, got one of {turn['role']}. Fill it in or "
                    "remove the row.",
                )
        for name in ("answer", "rejected"):
            self._check_text(getattr(draft, name), name)
        is_pair = is_image_pair(draft, raw)
        if draft.answer and draft.answer == draft.rejected and not is_pair:
            raise RefusedRowError(
                "rejected",
                "equal-answers",
                f"rejected must differ from the answer, got {draft.answer[:80]!r} twice. Remove "
                "the row.",
            )
        return self._images.find(image)

    def _check_text(self, text: str, name: str) -> None:
        check_unicode(text, name)
        for token in self._tokens:
            if token in text:
                raise RefusedRowError(
                    name,
                    "special-token",
                    f"{name} must not contain the special token {token!r}, got "
                    f"{surroundings(text, token)!r}. {token_remedy(name, text, token)}",
                )

    def _extra(self, raw: dict[str, Any]) -> dict[str, Any]:
        """Return the keys that the layout does not know, as far as JSON can hold their values."""
        kept = {}
        for name in raw.keys() - self._layout.keys:
            if _fits_json([name, raw[name]]):
                kept[name] = raw[name]
            else:
                self.left_out.add(name.encode(errors="backslashreplace").decode())
        return {name: kept[name] for name in raw if name in kept}


def object_of(found: Found) -> dict[str, Any]:
    """Return the row at one place of a file.

    Raises:
        RefusedRowError: There is no row, or it is not an object.
    """
    if found.problem:
        raise found.problem
    if not isinstance(found.row, dict):
        raise RefusedRowError(
            "",
            "not-an-object",
            f"a row must be an object, got {found.row!r:.80}. Correct or remove it.",
        )
    return found.row


def id_of(raw: Mapping[str, Any], number: int) -> str:
    """Return the id of a row, or its number.

    Raises:
        RefusedRowError: The id is neither a text nor a number.
    """
    row_id = raw.get("id")
    if row_id is None:
        row_id = number
    if isinstance(row_id, bool) or not isinstance(row_id, str | int) or row_id == "":
        raise RefusedRowError(
            "id",
            "wrong-type",
            f"id must be a string or a number, got {row_id!r:.80}. Correct it.",
        )
    check_unicode(str(row_id), "id")
    return str(row_id)


def one_image(raw: Mapping[str, Any], layout: Layout) -> Any:
    """Return the only image of a row.

    Raises:
        RefusedRowError: The row has no image, or more than one.
    """
    images = layout.images(dict(raw))
    name = "images" if raw.get("image") is None and "images" in raw else "image"
    if not images:
        raise RefusedRowError(
            name,
            "missing-key",
            f"{name} must be one image, got {shown(raw.get(name), raw, name)}. Name a file of the "
            "image folder or remove the row.",
        )
    if len(images) > 1:
        raise RefusedRowError(
            name,
            "image-count",
            f"{name} must be one image, got {len(images)}. Split the row or remove it.",
        )
    return images[0]


def _stripped(draft: Draft) -> Draft:
    """Return the draft without whitespace around its texts."""
    return dataclasses.replace(
        draft,
        prompt=tuple({**turn, "content": turn["content"].strip()} for turn in draft.prompt),
        answer=draft.answer.strip(),
        rejected=draft.rejected.strip(),
    )


def _fits_json(value: Any) -> bool:
    try:
        json_text(value).encode()
    except (TypeError, ValueError, RecursionError):
        return False
    return True


def check_unicode(text: str, name: str) -> None:
    """Refuse a text with half a surrogate pair, which UTF-8 cannot encode.

    Raises:
        RefusedRowError: The text has one.
    """
    if text.isascii():
        return
    try:
        text.encode()
    except UnicodeEncodeError:
        raise RefusedRowError(
            name,
            "surrogate",
            f"{name} must be Unicode text, got half a character in {text[:80]!r}. Correct it.",
        ) from None
