"""What a dataset is built from: JSON lines of an image, a prompt and a good answer."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path

from realign.build.row import SourceRow
from realign.errors import RefusedError
from realign.files import file_sha256, read_jsonl
from realign.images import check_image_root, decode_image, resolve_image
from realign.records import IMAGE_TOKEN, surroundings


def read_source(path: Path, image_root: Path, special: Iterable[str] = ()) -> list[SourceRow]:
    """Read and check a source file.

    Args:
        path: The file.
        image_root: The folder of its images.
        special: The model's special tokens; no text may contain one.
    Raises:
        RefusedError: A line is not ``{"image", "prompt", "answer"}``, a value is empty or contains
            a special token, an image is missing or unreadable, or two rows share an id.
    """
    tokens = sorted({*special, IMAGE_TOKEN} - {""})
    if not path.is_file():
        raise RefusedError(
            f"source must be a JSONL file, got {path}, which does not exist. Check --source."
        )
    check_image_root(image_root)
    rows: dict[str, SourceRow] = {}
    checked: set[Path] = set()
    for number, raw in enumerate(read_jsonl(path), start=1):
        where = f"{path.name}, line {number}"
        for name in ("image", "prompt", "answer"):
            if (
                not isinstance(raw, dict)
                or not isinstance(raw.get(name), str)
                or not raw[name].strip()
            ):
                raise RefusedError(
                    f"{where}: {name} must be a non-empty string, got {raw!r:.120}. Fill it in or "
                    "remove the line."
                )
            if found := [token for token in tokens if name != "image" and token in raw[name]]:
                raise RefusedError(
                    f"{where}: {name} must not contain the special token {found[0]!r}, got "
                    f"{surroundings(raw[name], found[0])!r}. Remove it; the image goes before the "
                    "prompt by itself."
                )
        row_id = str(raw.get("id", number - 1))
        if row_id in rows:
            raise RefusedError(
                f"{where}: id must be unique, got {row_id!r} again. Rename one; without an id a "
                "line is named by its number."
            )
        image = resolve_image(image_root, raw["image"], where)
        if image not in checked:
            decode_image(image.read_bytes(), f"{where}, {raw['image']}")
            checked.add(image)
        rows[row_id] = SourceRow(
            row_id,
            raw["image"],
            image,
            ({"role": "user", "content": raw["prompt"].strip()},),
            raw["answer"].strip(),
        )
    if not rows:
        raise RefusedError(f"source must have at least one row, got none in {path}. Add rows.")
    return list(rows.values())


@dataclass(frozen=True)
class Corpus:
    """The distinct images of a source, by content: byte duplicates are one image."""

    names: list[str]
    paths: list[Path]
    digests: list[str]

    @classmethod
    def of(cls, rows: list[SourceRow]) -> Corpus:
        """Collect the images of ``rows`` in order of first appearance."""
        found: dict[str, tuple[str, Path]] = {}
        seen: set[Path] = set()
        for row in rows:
            if row.path not in seen:
                seen.add(row.path)
                found.setdefault(file_sha256(row.path), (row.image, row.path))
        return cls(
            [name for name, _ in found.values()], [path for _, path in found.values()], list(found)
        )
