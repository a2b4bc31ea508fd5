"""Preference records: what they are, how they are read from parquet and from the authors' JSON,
what is refused.

Columns are the ones that TRL's DPOTrainer reads (``images``, ``prompt``, ``chosen``, ``rejected``)
plus ``rejected_images`` and ``meta``. Image bytes travel undecoded; rows are known by their
content.
"""

from __future__ import annotations

import io
import json
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import Any, cast

from PIL import Image

from realign.errors import RefusedError
from realign.files import canonical_json, content_sha256, replacing
from realign.images import MAX_BYTES, decode_image, resolve_image

Message = dict[str, str]  # {"role": ..., "content": ...}
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
    """

    id: str
    images: tuple[bytes, ...]
    prompt: tuple[Message, ...]
    chosen: str
    rejected: str
    rejected_images: tuple[bytes, ...] = ()
    meta: dict[str, Any] = field(default_factory=dict)

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

    def open_images(self, *, rejected: bool = False) -> list[Image.Image]:
        """Decode the original or the retrieved images to RGB."""
        which, name = (
            (self.rejected_images, "rejected_images") if rejected else (self.images, "images")
        )
        return [decode_image(raw, f"row {self.id}, {name}") for raw in which]


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
    if problems:
        shown = "\n".join(problems[:20])
        more = f"\n... and {len(problems) - 20} more." if len(problems) > 20 else ""
        raise RefusedError(f"{len(problems)} problem(s) in {len(records)} rows:\n{shown}{more}")
    if not records:
        raise RefusedError("data must have at least one row, got none.")


def _problems(record: Record, special: list[str]) -> Iterable[str]:
    where = f"row {record.id}"
    for name in ("chosen", "rejected"):
        text = getattr(record, name)
        if not text.strip():
            yield f"{where}: {name} must not be empty, got {text!r}. Remove the row."
        for token in special:
            if token in text:
                yield (
                    f"{where}: {name} must not contain the special token {token!r}, "
                    f"got {text[:80]!r}. Remove it."
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
                    f"{where}: prompt must not contain the special token {token!r}. "
                    "Remove it from the text."
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


def _image_names(record: Record) -> str:
    source = record.meta.get("source", {})
    return f"{source.get('image')!r} and {source.get('retrieved_image')!r}"


def write_parquet(records: Sequence[Record], path: Path) -> None:
    """Write records as parquet with ``datasets`` image columns, whole or not at all. Equal
    records, equal bytes.
    """
    from datasets import Dataset, Features, Image, List, Value

    turn = {"role": Value("string"), "content": Value("string")}
    features = Features(
        {
            "id": Value("string"),
            "images": List(Image()),
            "prompt": List(turn),
            "chosen": List(turn),
            "rejected": List(turn),
            "rejected_images": List(Image()),
            "meta": Value("string"),
        }
    )
    rows = [
        {
            "id": record.id,
            "images": [{"bytes": raw, "path": None} for raw in record.images],
            "prompt": list(record.prompt),
            "chosen": [{"role": "assistant", "content": record.chosen}],
            "rejected": [{"role": "assistant", "content": record.rejected}],
            "rejected_images": [{"bytes": raw, "path": None} for raw in record.rejected_images],
            "meta": canonical_json(record.meta),
        }
        for record in records
    ]
    with replacing(path) as temporary:
        Dataset.from_list(rows, features=features).to_parquet(temporary)


def read_parquet(path: Path) -> list[Record]:
    """Read the records of :func:`write_parquet`, or of any parquet file with the same columns.

    Raises:
        RefusedError: A column is missing, or a row does not have the shape that it must have.
    """
    import pyarrow as pa
    import pyarrow.parquet as pq

    try:
        table = pq.read_table(path)
    except pa.ArrowInvalid as error:
        raise RefusedError(f"{path} must be a parquet file ({error}).") from None
    required = ("images", "prompt", "chosen", "rejected")
    if missing := [name for name in required if name not in table.column_names]:
        raise RefusedError(
            f"{path} must have columns {list(required)}, lacks {missing}. Build it with `realign "
            f"build`."
        )
    records = []
    for number, row in enumerate(table.to_pylist()):
        where = f"{path.name}, row {row.get('id', number)}"
        records.append(
            Record(
                id=str(row.get("id", number)),
                images=_image_bytes(row["images"], where),
                prompt=_check_messages(row["prompt"], where, "prompt"),
                chosen=_only_answer(row["chosen"], where),
                rejected=_only_answer(row["rejected"], where),
                rejected_images=_image_bytes(row.get("rejected_images") or [], where),
                meta=json.loads(row.get("meta") or "{}"),
            )
        )
    return records


def _image_bytes(images: list[dict[str, Any]], where: str) -> tuple[bytes, ...]:
    if any(not image["bytes"] for image in images):
        raise RefusedError(
            f"{where}: images must be embedded as bytes, got a path. Embed them when saving."
        )
    return tuple(image["bytes"] for image in images)


def _check_messages(turns: Any, where: str, name: str) -> tuple[Message, ...]:
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


def _only_answer(turns: list[Message], where: str) -> str:
    _check_messages(turns, where, "an answer")
    if len(turns) != 1 or turns[0]["role"] != "assistant":
        raise RefusedError(
            f"{where}: an answer must be one assistant turn, got {[t['role'] for t in turns]}."
        )
    return turns[0]["content"]


def read_official_json(path: Path, image_root: Path) -> list[Record]:
    """Read the published layout: a list of ``{image, retrieved_image, chosen, rejected}`` and one
    image folder.

    Raises:
        RefusedError: The file or a row does not have that layout, or an image is missing.
    """
    try:
        rows = json.loads(path.read_text(encoding="utf-8"))
    except (json.JSONDecodeError, UnicodeDecodeError) as error:
        raise RefusedError(f"{path} must be UTF-8 JSON ({error}).") from None
    if not isinstance(rows, list):
        raise RefusedError(f"{path} must be a list of rows, got {type(rows).__name__}.")
    return [_official_record(row, number, path, image_root) for number, row in enumerate(rows)]


def _official_record(row: dict[str, Any], number: int, path: Path, image_root: Path) -> Record:
    where = f"{path.name}, row {number}"
    if missing := [name for name in ("chosen", "rejected") if name not in row]:
        raise RefusedError(f"{where}: keys {missing} are missing, found {sorted(row)}.")
    if "image" in row and "retrieved_image" not in row:
        raise RefusedError(
            f"{where}: retrieved_image is missing beside image {row['image']!r}. Add it."
        )
    names = {name: row[name] for name in ("image", "retrieved_image") if name in row}
    for name, value in names.items():
        if not isinstance(value, str) or "\0" in value:
            raise RefusedError(f"{where}: {name} must be a file name, got {value!r:.80}.")
    prompt, chosen = _split_conversation(row["chosen"], where, "chosen")
    rejected_prompt, rejected = _split_conversation(row["rejected"], where, "rejected")
    if prompt != rejected_prompt:
        raise RefusedError(
            f"{where}: chosen and rejected must differ in the last answer only. Make their turns "
            f"equal."
        )
    raw = {
        name: _read_limited(resolve_image(image_root, file, where)) for name, file in names.items()
    }
    return Record(
        id=str(number),
        images=tuple(raw[name] for name in names if name == "image"),
        prompt=prompt,
        chosen=chosen,
        rejected=rejected,
        rejected_images=tuple(raw[name] for name in names if name == "retrieved_image"),
        meta={"source": {"file": path.name, "index": number, **names}},
    )


def _read_limited(path: Path) -> bytes:
    with path.open("rb") as file:
        return file.read(MAX_BYTES + 1)


def _split_conversation(turns: Any, where: str, name: str) -> tuple[tuple[Message, ...], str]:
    """The turns before the last answer, without image placeholders, and that answer."""
    _check_messages(turns, where, name)
    roles = [turn.get("role") for turn in turns] if isinstance(turns, list) else []
    if not roles or roles != ["user", "assistant"] * (len(roles) // 2):
        raise RefusedError(
            f"{where}: {name} must alternate user and assistant turns, got {roles or turns!r}."
        )
    if any(IMAGE_TOKEN in turn["content"] for turn in turns[1:-1]):
        raise RefusedError(
            f"{where}: {name} must have {IMAGE_TOKEN} in its first turn only. Move it there."
        )
    prompt = [{"role": turn["role"], "content": turn["content"]} for turn in turns[:-1]]
    prompt[0]["content"] = prompt[0]["content"].replace(IMAGE_TOKEN, "").strip()
    return tuple(prompt), cast("str", turns[-1]["content"])


def read_records(data: Path, image_root: Path | None) -> list[Record]:
    """Read a dataset by what it is: a parquet file, a folder made by ``realign build``, or the
    authors' JSON.

    Raises:
        RefusedError: The path is none of these, or JSON comes without an image folder.
    """
    if data.is_dir():
        data = data / "dataset.parquet"
    if not data.is_file():
        raise RefusedError(
            f"data must be a dataset file or folder, got {data}, which does not exist."
        )
    if data.suffix == ".parquet":
        return read_parquet(data)
    if data.suffix == ".json":
        if image_root is None:
            raise RefusedError(
                f"images must name the image folder for {data.name}. Pass --images FOLDER."
            )
        return read_official_json(data, image_root)
    raise RefusedError(f"data must end in .parquet or .json, got {data.name}.")


def thumbnail_png(raw: bytes, side: int) -> bytes:
    """PNG bytes of an image reduced to at most ``side`` pixels, for pages."""
    image = decode_image(raw, "image")
    image.thumbnail((side, side))
    buffer = io.BytesIO()
    image.save(buffer, "PNG")
    return buffer.getvalue()
