"""A scorer without a model: the builder, its files and its lock are the real ones, and thousands of
builds take seconds.
"""

from __future__ import annotations

import hashlib
import time
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest

from realign.data.records import Record
from realign.reference.build import build_cache
from realign.reference.shards import Rows

CELLS = 3
IDENTITY: dict[str, Any] = {
    "schema": 4,
    "semantics": {"cells": CELLS, "rejected_scoring": "label", "files": {"model": "a" * 64}},
    "numerics": {
        "dtype": "float32",
        "autocast": False,
        "rows": "separate",
        "float32": {"matmul": "ieee"},
    },
}


def rows_of(records: Sequence[Record]) -> Rows:
    """Values that follow from the key alone, so that any mix of builds must agree."""
    digests = [hashlib.blake2b(record.key.encode()).digest() for record in records]
    raw = np.array([list(digest) for digest in digests], np.uint8)
    return Rows(
        key=np.array([list(bytes.fromhex(record.key)) for record in records], np.uint8),
        logps=-(raw[:, :CELLS].astype(np.float64) + 1) * 1.37,
        num_tokens=raw[:, 3 : 3 + CELLS].astype(np.int32),
        token_digest=raw[:, : 16 * CELLS].reshape(len(records), CELLS, 16).copy(),
        pixel_digest=raw[:, 32:].reshape(len(records), 2, 16).copy(),
    )


@dataclass
class Arithmetic:
    """Scoring and scorer at once.

    Attributes:
        batch_size: Rows a batch.
        cells: Values a row.
        seconds: How long a batch takes.
        scored: How many rows were scored.
    """

    batch_size: int = 2
    cells: int = CELLS
    seconds: float = 0.0
    scored: list[str] = field(default_factory=list)

    @property
    def scoring(self) -> Arithmetic:
        return self

    def load(self) -> Arithmetic:
        return self

    def score(self, records: Sequence[Record]) -> Rows:
        time.sleep(self.seconds)
        self.scored += [record.id for record in records]
        return rows_of(records)

    def pixel_digests(self, record: Record) -> np.ndarray:
        return rows_of([record]).pixel_digest[0]

    def score_alone(self, record: Record) -> Rows:
        return rows_of([record])


def text_rows(count: int, first: int = 0) -> list[Record]:
    """Small rows that differ."""
    return [
        Record(
            id=f"t{number}",
            images=(b"original",),
            prompt=({"role": "user", "content": "What is it?"},),
            chosen=f"A {number}.",
            rejected=f"Not {number}.",
            rejected_images=(b"retrieved",),
        )
        for number in range(first, first + count)
    ]


def build(
    records: Sequence[Record],
    root: Path,
    *,
    scoring: Arithmetic | None = None,
    shard_size: int = 4,
    identity: dict[str, Any] = IDENTITY,
) -> Path:
    """Build with the real builder."""
    return build_cache(
        records,
        scoring or Arithmetic(),  # type: ignore[arg-type]
        root,
        identity=identity,
        shard_size=shard_size,
    )


@pytest.fixture
def synthetic() -> SimpleNamespace:
    """The names above."""
    return SimpleNamespace(
        build=build,
        rows=text_rows,
        values=rows_of,
        Scoring=Arithmetic,
        identity=IDENTITY,
        cells=CELLS,
    )
