"""LLaMA-Factory's ShareGPT layout with ``ranking``, which holds the answer pair alone, and the same
rows with their retrieved images, for examples/llama_factory_rdpo.py.
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
WHOLE_PAIRS = "rdpo.jsonl"
NOTE = (
    "answer pairs alone: LLaMA-Factory has no image pair; train with dataset_dir: this folder and "
    "dataset: realign; for rDPO see docs/guides/trainers/llama-factory.md"
)
FROM = {"user": "human", "assistant": "gpt", "system": "system"}
_ANSWER_PAIRS = {
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
# the formatting that the example registers, which keeps the retrieved images
_RDPO_PAIRS = {**_ANSWER_PAIRS, "file_name": WHOLE_PAIRS, "formatting": "rdpo"}


def write_llamafactory(records: Iterable[Record], folder: Path) -> Counter[str]:
    """Write ``data.json``, ``rdpo.jsonl``, ``dataset_info.json`` and ``images/`` into ``folder``;
    return counts.
    """
    images = ImageFolder(folder / "images")
    counts: Counter[str] = Counter()

    def rows() -> Iterator[dict[str, Any]]:
        for record in records:
            counts["rows read"] += 1
            counts["image pairs, in rdpo.jsonl alone"] += bool(record.rejected_images)
            row = {
                "id": record.id,
                "conversations": [
                    {"from": FROM[turn["role"]], "value": turn["content"]}
                    for turn in with_placeholders(record)
                ],
                "chosen": {"from": "gpt", "value": record.chosen},
                "rejected": {"from": "gpt", "value": record.rejected},
                "images": named(record, images),
            }
            yield row
            if record.rejected_images:
                retrieved = named(record, images, rejected=True)
                whole_pairs.write(json_text({**row, "rejected_images": retrieved}) + "\n")

    with (folder / WHOLE_PAIRS).open("w", encoding="utf-8") as whole_pairs:
        counts["rows written"] = write_list(folder / FILE, rows())
    descriptions = {"realign": _ANSWER_PAIRS, "realign_rdpo": _RDPO_PAIRS}
    if not counts["image pairs, in rdpo.jsonl alone"]:
        (folder / WHOLE_PAIRS).unlink()
        del descriptions["realign_rdpo"]
    (folder / "dataset_info.json").write_text(
        json_text(descriptions, indent=2) + "\n", encoding="utf-8"
    )
    counts["images written"] = len(images)
    counts["images renamed"] = images.renamed
    return counts
