"""LLaMA-Factory's ShareGPT layout with ``ranking``: the answer pair alone, for it knows no image
pair.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any

from realign.data.export.folder import ImageFolder
from realign.data.export.rows import named, with_placeholders, write_list
from realign.data.records import Record
from realign.runtime.files import json_text

FILE = "data.json"
NOTE = (
    "answer pairs alone: LLaMA-Factory has no image pair; train with dataset_dir: this folder and "
    "dataset: realign"
)
FROM = {"user": "human", "assistant": "gpt", "system": "system"}
DESCRIPTION = {
    "realign": {
        "file_name": FILE,
        "formatting": "sharegpt",
        "ranking": True,
        "columns": {
            "messages": "conversations",
            "chosen": "chosen",
            "rejected": "rejected",
            "images": "images",
        },
    }
}


def write_llamafactory(records: Iterable[Record], folder: Path) -> Counter[str]:
    """Write ``data.json``, ``dataset_info.json`` and ``images/`` into ``folder``; return counts."""
    images = ImageFolder(folder / "images")
    counts: Counter[str] = Counter()

    def rows() -> Iterator[dict[str, Any]]:
        for record in records:
            counts["rows read"] += 1
            counts["image pairs left out"] += bool(record.rejected_images)
            yield {
                "id": record.id,
                "conversations": [
                    {"from": FROM[turn["role"]], "value": turn["content"]}
                    for turn in with_placeholders(record)
                ],
                "chosen": {"from": "gpt", "value": record.chosen},
                "rejected": {"from": "gpt", "value": record.rejected},
                "images": named(record, images),
            }

    counts["rows written"] = write_list(folder / FILE, rows())
    (folder / "dataset_info.json").write_text(
        json_text(DESCRIPTION, indent=2) + "\n", encoding="utf-8"
    )
    counts["images written"] = len(images)
    counts["images renamed"] = images.renamed
    return counts
