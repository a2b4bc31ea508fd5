"""ms-swift's JSON lines, as documented for its versions 3.8 and later: a row with
``rejected_response`` for the answer pair and one with ``rejected_images`` for the image pair. A
second file has both in one row, for examples/ms_swift_plugin.py.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any

from realign.data.export.folder import ImageFolder
from realign.data.export.rows import named, with_placeholders, write_lines
from realign.data.records import Record
from realign.runtime.files import json_text

FILE = "data.jsonl"
WHOLE_PAIRS = "rdpo.jsonl"
NOTE = (
    "image paths are relative to this folder: run `swift rlhf --rlhf_type dpo --dataset "
    "data.jsonl` in it, where both pairs weigh the same; for rDPO see "
    "docs/guides/trainers/ms-swift.md"
)


def write_swift(records: Iterable[Record], folder: Path) -> Counter[str]:
    """Write ``data.jsonl``, ``rdpo.jsonl`` and ``images/`` into ``folder``; return counts."""
    images = ImageFolder(folder / "images")
    counts: Counter[str] = Counter()

    def rows() -> Iterator[dict[str, Any]]:
        for record in records:
            counts["rows read"] += 1
            answered = {
                "messages": [
                    *with_placeholders(record),
                    {"role": "assistant", "content": record.chosen},
                ],
                "images": named(record, images),
            }
            counts["answer pairs"] += 1
            yield {"id": record.id, **answered, "rejected_response": record.rejected}
            if record.rejected_images:
                counts["image pairs"] += 1
                retrieved = named(record, images, rejected=True)
                yield {"id": record.id, **answered, "rejected_images": retrieved}
                whole = {"rejected_response": record.rejected, "rejected_images": retrieved}
                whole_pairs.write(json_text({"id": record.id, **answered, **whole}) + "\n")
            else:
                counts["rows without an image pair"] += 1

    with (folder / WHOLE_PAIRS).open("w", encoding="utf-8") as whole_pairs:
        counts["rows written"] = write_lines(folder / FILE, rows())
    if not counts["image pairs"]:
        (folder / WHOLE_PAIRS).unlink()
    counts["images written"] = len(images)
    counts["images renamed"] = images.renamed
    return counts
