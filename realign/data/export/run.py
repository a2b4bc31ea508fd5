"""``realign export``: write a dataset in the layout of another trainer.

<out>/export.json   hash of the exported rows, counts, and how to use the files
<out>/...           the layout's own files
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass
from hashlib import sha256
from pathlib import Path
from typing import Any

from realign.data.dataset import read_kept_records
from realign.data.export import llamafactory, official, trl
from realign.data.export import ms_swift as swift
from realign.data.export.folder import check_new
from realign.data.records import Record
from realign.errors import RefusedError
from realign.runtime.files import canonical_json, content_sha256, new_folder, write_json
from realign.runtime.progress import Progress
from realign.runtime.run_folder import check_out
from realign.runtime.strict_json import read_json

Writer = Callable[[Iterable[Record], Path], Counter[str]]
WRITERS: Mapping[str, tuple[Writer, str]] = {
    "official": (official.write_official, official.NOTE),
    "ms-swift": (swift.write_swift, swift.NOTE),
    "llamafactory": (llamafactory.write_llamafactory, llamafactory.NOTE),
    "trl": (trl.write_trl, trl.NOTE),
}
MANIFEST = "export.json"


@dataclass(frozen=True)
class Exported:
    """Named counts of an export, and a note on its use."""

    counts: dict[str, int]
    note: str


def export(data: Path, images: Path | None, to: str, out: Path) -> Exported:
    """Write a dataset in another layout, as a folder that is whole or absent.

    Repeating the call changes nothing.

    Args:
        data: Parquet file, ``realign build`` folder, or JSON.
        images: Image folder of JSON.
        to: ``official``, ``ms-swift``, ``llamafactory`` or ``trl``.
        out: A new or empty folder.
    Raises:
        RefusedError: The layout is unknown or cannot hold a row, or the folder holds other files.
    """
    if to not in WRITERS:
        raise RefusedError(f"to must be one of {[*WRITERS]}, got {to!r}. Correct --to.")
    check_out(out)
    write, note = WRITERS[to]
    records = read_kept_records(data, images)
    if not len(records):
        raise RefusedError(f"data must have at least one row, got none in {data}. Add rows.")
    if (out / MANIFEST).is_file():
        stored = read_json(out / MANIFEST)
        if isinstance(stored, dict) and stored.get("to") == to and "counts" in stored:
            digest = sha256()
            for record in records:
                _add(digest, record)
            if stored.get("records") == digest.hexdigest():
                return Exported(stored["counts"], note)
            raise RefusedError(
                f"out must be empty, or hold an export of the present rows of {data}, got {out} "
                "with an export of other rows. Remove that folder, or choose another --out."
            )
    check_new(out)
    digest = sha256()
    with new_folder(out) as folder, Progress(f"export to {to}", len(records)) as progress:

        def digested() -> Iterator[Record]:
            for record in records:
                _add(digest, record)
                yield record
                progress.advance()

        counts = {name: count for name, count in write(digested(), folder).items() if count}
        write_json(
            folder / MANIFEST,
            {"to": to, "records": digest.hexdigest(), "counts": counts, "note": note},
        )
    return Exported(counts, note)


def _add(digest: Any, record: Record) -> None:
    """Add a record to a hash of all records in their order."""
    digest.update(content_sha256(record.key, record.id, canonical_json(record.meta)).encode())
