"""Probe of a cache: a few rows are computed again, each sequence alone, to measure how much
log-probabilities change with the batch and the layout, and whether a model can share prefixes.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from random import Random
from typing import Any

import numpy as np

from realign.data.records import Record
from realign.errors import RefusedError
from realign.modeling.float32 import EXACT
from realign.modeling.identity import Identity
from realign.reference.reference import CacheReference
from realign.reference.scoring import Scorer

PROBE_ROWS = 64
SEED = 0
# largest difference between float32 sums of a few hundred tokens, in nats and relative to the sum
ABSOLUTE, RELATIVE = 1e-4, 1e-6


def probe_rows(keys: Mapping[str, int] | Sequence[str]) -> list[str]:
    """Return the keys of the rows to probe, which do not depend on the order of the rows."""
    ordered = sorted(keys)
    return sorted(Random(SEED).sample(ordered, min(PROBE_ROWS, len(ordered))))


def rounding(logps: np.ndarray) -> np.ndarray:
    """Return the largest error that float32 may cause, in nats."""
    return ABSOLUTE + RELATIVE * np.abs(logps)


def deviations(
    reference: CacheReference, records: Sequence[Record], scorer: Scorer
) -> tuple[np.ndarray, np.ndarray]:
    """Return cached and recomputed log-probabilities, both ``(rows, C)``."""
    cached = np.stack([reference[record.key].numpy() for record in records])
    alone = np.concatenate([scorer.score_alone(record).logps for record in records])
    return cached, alone[:, : cached.shape[1]]


def run_probe(
    reference: CacheReference, records: Sequence[Record], scorer: Scorer, identity: Identity
) -> dict[str, Any]:
    """Measure the batch variance and check it.

    Args:
        reference: The cached values.
        records: Rows of :func:`probe_rows`.
        scorer: Scorer that computed them.
        identity: Identity of the values.
    Returns:
        The entry of the manifest: ``rows``, ``rms`` and ``max`` in nats by cell.
    Raises:
        RefusedError: Float32 values differ by more than rounding, so the layout of the batches
            gives wrong values for this model.
    """
    cached, alone = deviations(reference, records, scorer)
    off = np.abs(cached - alone)
    if is_exact(identity) and (bad := off > rounding(alone)).any():
        row, cell = (int(index) for index in np.argwhere(bad)[0])
        layout = identity["numerics"]["rows"]
        raise RefusedError(
            f"{bad.any(axis=1).sum()} of {len(records)} probed rows must have the same log-"
            f"probabilities alone as in a batch ({layout}), first: {records[row].where}, cell "
            f"{cell}, got {cached[row, cell]:.6f} and {alone[row, cell]:.6f} alone, more than "
            f"{ABSOLUTE} + {RELATIVE} of the value apart. This layout is wrong for this model; "
            + (
                "set cache.shared_prefix and train.shared_prefix to false."
                if layout == "shared prefix"
                else "set cache.batch_size and train.batch_size to 1, and report the model."
            )
        )
    return {
        "rows": len(records),
        "rms": [float(value) for value in np.sqrt((off**2).mean(axis=0))],
        "max": [float(value) for value in off.max(axis=0)],
    }


def is_exact(identity: Identity) -> bool:
    """Return whether all products of an identity's values are computed in float32."""
    numerics = identity["numerics"]
    return (
        numerics["dtype"] == "float32"
        and not numerics["autocast"]
        and {*numerics["float32"].values()} <= EXACT
    )
