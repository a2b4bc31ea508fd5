"""Using values of other numerics: only when asked, and after some of them were computed again."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import numpy as np

from realign.cache.identity import Identity, identity_differences
from realign.cache.probe import deviations, rounding
from realign.cache.reference import CacheReference
from realign.cache.scoring import Scorer, free_reference
from realign.errors import RefusedError
from realign.progress import announce
from realign.records import Record

# of what a value moves with the batch, on the machine of the cache or on this one
TOLERATED_VARIANCES = 2.0


def accept_numerics(
    reference: CacheReference,
    probed: Sequence[Record],
    stored: Identity,
    needed: Identity,
    load: Callable[[], Scorer],
) -> dict[str, Any]:
    """Compute rows here and compare them with the cached ones.

    The tolerance of each value is 1e-4 nats + 1e-6 of it, and twice the most that any probed value
    moves when its row is computed alone: on the machine of the cache, or on this one.

    Args:
        reference: The cached values.
        probed: Rows of :func:`realign.cache.probe.probe_rows`.
        stored: Identity of the values.
        needed: Identity of this run.
        load: Loads the reference model.
    Returns:
        What is to be recorded: what differs, how many rows were compared, the largest difference,
        the tolerance and the most that a value moves, all in nats.
    Raises:
        RefusedError: A value differs by more.
    """
    scorer = load()
    batch = scorer.scoring.batch_size
    here = np.concatenate(
        [
            scorer.score(probed[start : start + batch]).logps
            for start in range(0, len(probed), batch)
        ]
    )
    cached, alone = deviations(reference, probed, scorer)
    del scorer
    free_reference()
    here = here[:, : cached.shape[1]]
    moved = [float(np.abs(here - alone).max())]
    if reference.variance is not None:
        moved.append(max(reference.variance.max))
    tolerance = rounding(here) + TOLERATED_VARIANCES * max(moved)
    off = np.abs(cached - here)
    differences = identity_differences(stored["numerics"], needed["numerics"])
    if (bad := off > tolerance).any():
        row, cell = (int(index) for index in np.argwhere(bad)[0])
        raise RefusedError(
            f"{bad.any(axis=1).sum()} of {len(probed)} rows must have the cached log-probabilities "
            f"here too, first: {probed[row].where}, cell {cell}, got {here[row, cell]:.6f} where "
            f"{cached[row, cell]:.6f} is cached; {tolerance[row, cell]:.2g} nats are accepted."
            + "".join(f"\n  {line}" for line in differences)
            + "\nRun `realign cache` for this model on this machine."
        )
    accepted = {
        "differences": differences,
        "rows": len(probed),
        "max_difference_nats": float(off.max()),
        "tolerance_nats": float(tolerance.min()),
        "batch_variance_nats": max(moved),
    }
    announce(
        f"cached log-probabilities of other numerics accepted: {len(probed)} rows computed here "
        f"differ by {off.max():.2g} nats at most, {tolerance.min():.2g} were allowed"
    )
    return accepted
