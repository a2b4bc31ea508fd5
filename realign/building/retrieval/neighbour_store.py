"""Neighbours on disk: one safetensors file per range of images, which identifies its origin.

<folder>/00003.safetensors   indices (images of the range, k), -1 if there are no more
                             cosines, NaN if there are no more
                             counts of each of REASONS
    origin    hash of what neighbours depend on: rule, index, embeddings, duplicates
    images    the range
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping, Sequence
from pathlib import Path

import numpy as np

from realign.building.retrieval.neighbours import EXCLUDED, REASONS, Neighbours
from realign.building.retrieval.sealed_arrays import Arrays, encode_arrays, load_arrays
from realign.errors import RefusedError
from realign.runtime.files import canonical_json, content_sha256, replacing

DIFFERENCES = {
    "origin": "it was made from other images, embeddings or rules",
    "images": "it is of other images",
}


class NeighbourStore:
    """The shards of one search.

    Args:
        folder: Folder of the shards, which need not exist.
        origin: Everything that neighbours depend on.
        ranges: The images of every shard, one range after the other.
    """

    def __init__(self, folder: Path, origin: Mapping[str, object], ranges: Sequence[range]) -> None:
        self.folder = folder
        self.origin = content_sha256(canonical_json(origin))
        self.ranges = ranges

    def path(self, number: int) -> Path:
        """Return the file of a shard."""
        return self.folder / f"{number:05d}.safetensors"

    def missing(self) -> list[int]:
        """Return the numbers of the shards to compute: those that are absent, damaged, or of
        another origin.
        """
        return [n for n in range(len(self.ranges)) if isinstance(self._load(n), str)]

    def encode(self, images: range, found: Neighbours) -> bytes:
        """Return the content of a shard's file."""
        counts = found.excluded + found.short
        arrays: Arrays = {
            "indices": found.indices.astype(np.int64),
            "cosines": found.cosines.astype(np.float32),
            "counts": np.array([counts[reason] for reason in REASONS], dtype=np.int64),
        }
        return encode_arrays(arrays, self._origin(images))

    def write(self, number: int, content: bytes) -> None:
        """Write what :meth:`encode` returned, whole or not at all."""
        with replacing(self.path(number)) as temporary:
            temporary.write_bytes(content)

    def read(self) -> Neighbours:
        """Return the neighbours of all images, in order.

        Raises:
            RefusedError: A shard is missing, damaged, or of another origin.
        """
        parts: list[Arrays] = []
        for number in range(len(self.ranges)):
            shard = self._load(number)
            if isinstance(shard, str):
                raise RefusedError(
                    f"{self.path(number)} must hold the neighbours of this build's images, but "
                    f"{shard}. Delete it and run again."
                )
            parts.append(shard)
        counts: Counter[str] = Counter()
        for part in parts:
            counts.update(dict(zip(REASONS, part["counts"].tolist(), strict=True)))
        excluded = Counter({name: counts[name] for name in EXCLUDED})
        return Neighbours(
            np.concatenate([part["indices"] for part in parts]),
            np.concatenate([part["cosines"] for part in parts]),
            +excluded,
            +(counts - excluded),
        )

    def _load(self, number: int) -> Arrays | str:
        """Return the arrays of a shard, or what is wrong with it."""
        return load_arrays(self.path(number), self._origin(self.ranges[number]), DIFFERENCES)

    def _origin(self, images: range) -> dict[str, object]:
        return {"origin": self.origin, "images": [images.start, images.stop]}
