"""Neighbours on disk: a safetensors file for each range of images, which says what it was made
from.

    <folder>/00003.safetensors   indices (images of the range, k), -1 where there are no more
                                 cosines, NaN there
                                 counts, of each of REASONS
        origin    hash of what neighbours depend on: rule, index, embeddings, duplicates
        images    the range
        content   hash of the arrays' own bytes
"""

from __future__ import annotations

import hashlib
import json
from collections import Counter
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray
from safetensors import SafetensorError, safe_open
from safetensors.numpy import save

from realign.building.retrieval.neighbours import EXCLUDED, REASONS, Neighbours
from realign.errors import RefusedError
from realign.runtime.files import canonical_json, content_sha256, replacing

NAME = "neighbours"
ARRAYS = ("indices", "cosines", "counts")
Arrays = dict[str, NDArray[Any]]


class NeighbourStore:
    """The shards of one search.

    Args:
        folder: Where they lie; it need not exist.
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
        """Return the numbers of the shards that must be made: absent, damaged, or made from
        something else.
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
        # one entry: safetensors writes several in an order that changes
        return save(arrays, {NAME: canonical_json(self._metadata(images, arrays))})

    def write(self, number: int, content: bytes) -> None:
        """Write what :meth:`encode` returned, whole or not at all."""
        with replacing(self.path(number)) as temporary:
            temporary.write_bytes(content)

    def read(self) -> Neighbours:
        """Return the neighbours of all images, in order.

        Raises:
            RefusedError: A shard is missing, damaged, or made from something else.
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
        path = self.path(number)
        if not path.is_file():
            return "it does not exist"
        try:
            with safe_open(path, framework="numpy") as file:
                metadata = json.loads((file.metadata() or {})[NAME])
                if metadata["origin"] != self.origin:
                    return "it was made from other images, embeddings or rules"
                arrays = {name: file.get_tensor(name) for name in ARRAYS}
        except (SafetensorError, OSError, KeyError, ValueError, TypeError) as error:
            return f"it is damaged ({error})"
        if metadata != self._metadata(self.ranges[number], arrays):
            return "it is damaged or of other images"
        return arrays

    def _metadata(self, images: range, arrays: Arrays) -> dict[str, object]:
        parts = [
            part
            for name, array in arrays.items()
            for part in (name, str(array.dtype), str(array.shape), array.tobytes())
        ]
        return {
            "origin": self.origin,
            "images": [images.start, images.stop],
            "content": content_sha256(*parts),
        }


def array_sha256(array: np.ndarray) -> str:
    """SHA-256 of an array's bytes."""
    return hashlib.sha256(array.tobytes()).hexdigest()
