"""Turns what stands at one place of a source into checked rows."""

from __future__ import annotations

import json
from collections.abc import Iterable
from pathlib import Path
from typing import Any

from realign.build.row import SourceRow
from realign.build.sources.image_files import ImageFiles
from realign.build.sources.json_rows import Found
from realign.build.sources.layout import Draft, Layout, RefusedRowError, Turns
from realign.records import IMAGE_TOKEN, surroundings


class RowReader:
    """Reads rows of one layout, each with an id of its own.

    Args:
        path: The source, for provenance.
        layout: What its rows are.
        image_root: Folder of named images.
        special: Tokens that no text may contain.
        turns: Which answers of a conversation become rows.
        extract_to: Folder for embedded images.

    Attributes:
        left_out: Keys whose values could not be kept.
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
    ) -> None:
        self._file, self._layout, self._turns = path.name, layout, turns
        self._tokens = sorted({*special, IMAGE_TOKEN} - {""})
        self._images = ImageFiles(image_root, extract_to, image_name)
        self._ids: set[str] = set()
        self._repeated: dict[str, int] = {}
        self.left_out: set[str] = set()

    def read(self, found: Found) -> list[SourceRow]:
        """The rows of one place.

        Raises:
            RefusedRowError: Why there are none.
        """
        if found.problem:
            raise found.problem
        raw = found.row
        if not isinstance(raw, dict):
            raise RefusedRowError(
                "",
                "not-an-object",
                f"a row must be an object, got {raw!r:.80}. Correct or remove it.",
            )
        place = found.place(self._file)
        base = self._id(raw, found.number)
        drafts = list(self._layout.drafts(raw, self._turns))
        extra = self._extra(raw)
        checked = [(draft, *self._check(draft)) for draft in drafts]
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
            prompt, answer, rejected = draft.prompt, draft.answer, draft.rejected
            rows.append(
                SourceRow(self._unique(row_id), name, path, prompt, answer, rejected, source, place)
            )
        return rows

    def _id(self, raw: dict[str, Any], number: int) -> str:
        row_id = raw.get("id")
        if row_id is None:
            row_id = number - 1
        if isinstance(row_id, bool) or not isinstance(row_id, str | int) or row_id == "":
            raise RefusedRowError(
                "id",
                "wrong-type",
                f"id must be a string or a number, got {row_id!r:.80}. Correct it.",
            )
        row_id = str(row_id)
        _check_unicode(row_id, "id")
        if row_id in self._ids and not self._layout.ids_repeat:
            raise RefusedRowError(
                "id",
                "duplicate-id",
                f"id must be unique, got {row_id!r:.80} again. Rename one; without an id a row is "
                "named by its number.",
            )
        return row_id

    def _unique(self, row_id: str) -> str:
        """``row_id``, with a number where it has been used before: the same in every run."""
        unique = row_id
        while unique in self._ids:
            self._repeated[row_id] = self._repeated.get(row_id, 1) + 1
            unique = f"{row_id}#{self._repeated[row_id]}"
        self._ids.add(unique)
        return unique

    def _check(self, draft: Draft) -> tuple[str, Path, str | None]:
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
        if draft.answer and draft.answer == draft.rejected:
            raise RefusedRowError(
                "rejected",
                "equal-answers",
                f"rejected must differ from the answer, got {draft.answer[:80]!r} twice. Remove "
                "the row.",
            )
        return self._images.find(draft.image)

    def _check_text(self, text: str, name: str) -> None:
        _check_unicode(text, name)
        for token in self._tokens:
            if token in text:
                raise RefusedRowError(
                    name,
                    "special-token",
                    f"{name} must not contain the special token {token!r}, got "
                    f"{surroundings(text, token)!r}. Remove it; the image goes before the prompt "
                    "by itself.",
                )

    def _extra(self, raw: dict[str, Any]) -> dict[str, Any]:
        """Keys that the layout does not know, as far as JSON can hold them."""
        kept = {}
        for name in raw.keys() - self._layout.keys:
            if _fits_json([name, raw[name]]):
                kept[name] = raw[name]
            else:
                self.left_out.add(name.encode(errors="backslashreplace").decode())
        return {name: kept[name] for name in raw if name in kept}


def _fits_json(value: Any) -> bool:
    try:
        json.dumps(value, ensure_ascii=False, allow_nan=False).encode()
    except (TypeError, ValueError, RecursionError):
        return False
    return True


def _check_unicode(text: str, name: str) -> None:
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
