"""Cached log-probabilities for training, by a record's key."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor

from realign.data.records import Record
from realign.errors import RefusedError
from realign.modeling.collate import PreferenceCollator
from realign.reference.shards import Rows
from realign_kernels import CELL_NAMES

REBUILD = "Run `realign cache` again, into another --out; this step has changed no weight."


@dataclass(frozen=True)
class BatchVariance:
    """Change of a log-probability when its row is computed in another batch and layout, in nats, by
    cell. It was measured when the cache was built.

    Attributes:
        rows: Number of rows that were measured.
        rms: Root mean square, of each cell.
        max: Largest, of each cell.
    """

    rows: int
    rms: tuple[float, ...]
    max: tuple[float, ...]

    @classmethod
    def of(cls, probe: Mapping[str, Any] | None) -> BatchVariance | None:
        """Return the variance that a manifest's probe holds; None without a probe."""
        if probe is None:
            return None
        return cls(probe["rows"], tuple(probe["rms"]), tuple(probe["max"]))


class CacheReference(Mapping[str, Tensor]):
    """Mapping of ``record.key`` to reference log-probabilities, shape ``(C,)`` float64.

    It holds arrays, not dictionaries: a million rows take 150 MB, which worker processes share.

    Args:
        rows: The values; of rows with equal keys the first counts.
        variance: Variance from the cache's probe; None for imported values.
        acceptance: Facts about values that were accepted in spite of other numerics, see
            :func:`realign.reference.read.accept_numerics`; None if the numerics are the same.
    """

    def __init__(
        self,
        rows: Rows,
        variance: BatchVariance | None = None,
        acceptance: Mapping[str, Any] | None = None,
    ) -> None:
        self.variance = variance
        self.acceptance = acceptance
        prefix = _prefixes(rows.key)
        order = np.argsort(prefix, kind="stable")  # equal keys stay in their order
        self._prefix, self._rows = prefix[order], rows.take(order)

    @property
    def batch_variance(self) -> float | None:
        """Root mean square in nats of the change of a log-probability by batching and layout, in
        the cell where it is largest; None if it was not measured.
        """
        return None if self.variance is None else max(self.variance.rms)

    def find(self, key: str) -> int | None:
        """Return the position of a key, or None."""
        raw = bytes.fromhex(key)
        prefix = int.from_bytes(raw[:8], "big")
        position = int(np.searchsorted(self._prefix, np.uint64(prefix)))
        while position < len(self._prefix) and self._prefix[position] == prefix:
            if self._rows.key[position].tobytes() == raw:
                return position
            position += 1
        return None

    def _position(self, key: str) -> int:
        position = self.find(key)
        if position is None:
            raise KeyError(key)
        return position

    def __getitem__(self, key: str) -> Tensor:
        return torch.from_numpy(self._rows.logps[self._position(key)].copy())

    def __contains__(self, key: object) -> bool:
        return isinstance(key, str) and self.find(key) is not None

    def __len__(self) -> int:
        return len(self._rows)

    def __iter__(self) -> Iterator[str]:
        return (key.tobytes().hex() for key in self._rows.key)

    def check_inputs(
        self, collator: PreferenceCollator, record: Record, digests: Sequence[bytes]
    ) -> None:
        """Refuse a row whose inputs differ from those that its values were computed from. Tokens
        and labels of every row are compared, pixels of one row in 256.

        A ``watch`` of :class:`realign.modeling.collate.PreferenceCollator`.

        Raises:
            RefusedError: The inputs differ; the message names the row and the difference.
        """
        position = self._position(record.key)
        for cell, digest in enumerate(digests):
            if digest != self._rows.token_digest[position, cell].tobytes():
                raise RefusedError(
                    f"{record.where}: the tokens or labels of its {CELL_NAMES[cell]} are not those "
                    f"that its cached log-probability was computed from. {REBUILD}"
                )
        if self.acceptance is not None:
            return  # other versions may decode other last bits, whose effect was measured
        for number, retrieved in enumerate((False, True)[: 1 if len(digests) < 3 else 2]):
            stored = self._rows.pixel_digest[position, number]
            if stored.any() and collator.pixel_digest(record, retrieved=retrieved) != (
                stored.tobytes()
            ):
                raise RefusedError(
                    f"{record.where}: the pixels of its {'retrieved' if retrieved else 'original'} "
                    "image are not those that its cached log-probability was computed from. "
                    f"{REBUILD}"
                )

    def positions(self, keys: Sequence[str]) -> np.ndarray:
        """Return the positions of many keys as int64, -1 for a missing key."""
        raw = np.frombuffer(bytes.fromhex("".join(keys)), np.uint8).reshape(len(keys), 32)
        found = np.searchsorted(self._prefix, _prefixes(raw)).astype(np.int64)
        is_inside = found < len(self)
        is_found = np.zeros(len(keys), bool)
        is_found[is_inside] = (self._rows.key[found[is_inside]] == raw[is_inside]).all(axis=1)
        # the key is absent, or comes after another key with the same prefix
        for index in np.flatnonzero(~is_found).tolist():
            position = self.find(keys[index])
            found[index] = -1 if position is None else position
        return found

    def only(self, positions: np.ndarray) -> CacheReference:
        """Return a mapping of the rows at some positions, each once."""
        rows = self._rows.take(np.unique(positions))
        return CacheReference(rows, self.variance, self.acceptance)


def _prefixes(keys: np.ndarray) -> np.ndarray:
    """Return the first eight bytes of each key as a number, for binary search."""
    return np.ascontiguousarray(keys[:, :8]).view(">u8")[:, 0].astype(np.uint64)
