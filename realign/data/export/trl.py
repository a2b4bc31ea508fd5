"""Export as parquet with this project's columns: TRL's DPOTrainer reads ``images``, ``prompt``,
``chosen`` and ``rejected`` as they are, and ignores the other columns.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Iterator
from pathlib import Path

from realign.data.formats.parquet import write_parquet
from realign.data.records import Record

FILE = "dataset.parquet"
NOTE = (
    'load_dataset("parquet", data_files="dataset.parquet") goes into DPOTrainer as it is; set '
    "max_length=None there; it trains the answer pair alone"
)


def write_trl(records: Iterable[Record], folder: Path) -> Counter[str]:
    """Write ``dataset.parquet`` into ``folder``; return counts."""
    counts: Counter[str] = Counter()

    def counted() -> Iterator[Record]:
        for record in records:
            counts["rows read"] += 1
            counts["image pairs kept, not read by TRL"] += bool(record.rejected_images)
            yield record

    write_parquet(counted(), folder / FILE)
    counts["rows written"] = counts["rows read"]
    return counts
