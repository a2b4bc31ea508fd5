"""ms-swift's JSON lines, as documented for its versions 3.8 and later: a row with
``rejected_response`` for the answer pair, a row with ``rejected_images`` for the image pair.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any

from realign.data.export.folder import ImageFolder
from realign.data.export.rows import named, with_placeholders, write_lines
from realign.data.records import Record

FILE = "data.jsonl"
NOTE = (
    "image paths are relative to this folder: run `swift rlhf --rlhf_type dpo --dataset "
    "data.jsonl` in it; both pairs weigh the same there"
)


def write_swift(records: Iterable[Record], folder: Path) -> Counter[str]:
    """Write ``data.jsonl`` and ``images/`` into ``folder``; return counts."""
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
            else:
                counts["rows without an image pair"] += 1

    counts["rows written"] = write_lines(folder / FILE, rows())
    counts["images written"] = len(images)
    counts["images renamed"] = images.renamed
    return counts
