"""Merging of caches of one identity, such as those of machines without a shared file system."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from realign.errors import RefusedError
from realign.modeling.identity import identity_differences, identity_folder
from realign.reference.inspect import cache_folders
from realign.reference.store import Committed, LockedCache, building, read_committed
from realign.runtime.run_folder import check_out


def merge_caches(sources: Sequence[Path], out: Path) -> Path:
    """Merge the rows of several caches into one and return the identity's folder. Rows that ``out``
    already has do not change; for a row of several sources, the first source counts.

    Args:
        sources: Folders with one finished cache each.
        out: Cache folder to add the rows to.
    Raises:
        RefusedError: A source holds no finished cache or several, or has another identity; each
            field that differs is named.
    """
    check_out(out)
    caches = [_read_only_one(source) for source in sources]
    first = caches[0]
    for other in caches[1:]:
        if lines := identity_differences(first.identity, other.identity):
            raise RefusedError(
                f"caches must be of one identity to be merged, got {first.place} (cached) and "
                f"{other.place} (needed):"
                + "".join(f"\n  {line}" for line in lines)
                + "\nMerge those that agree, or build one cache of all rows."
            )
    place = identity_folder(out, first.identity)
    with building(place):
        existing = read_committed(place)
        work = LockedCache.open(place, first.identity, repairs=True)
        for cache in caches:
            work.add(cache.rows)
        probes = [cache.manifest.probe for cache in (existing, *caches) if cache is not None]
        work.commit(_joined(probes))
    return place


def _read_only_one(source: Path) -> Committed:
    folders = cache_folders(source)
    if len(folders) > 1:
        raise RefusedError(
            f"a cache to merge must be of one identity, got {source} with {len(folders)}. Name one "
            f"of its folders: {', '.join(folder.name for folder in folders)}."
        )
    committed = read_committed(folders[0])
    if committed is None:
        raise RefusedError(
            f"cache {source} must be finished, got one that is not. Run `realign cache` again."
        )
    return committed


def _joined(probes: Sequence[Mapping[str, Any] | None]) -> dict[str, Any] | None:
    """Return the probes of several caches as one; None if no cache was probed."""
    known = [probe for probe in probes if probe is not None]
    if not known:
        return None
    weights = np.array([probe["rows"] for probe in known], float)
    squares = np.array([probe["rms"] for probe in known]) ** 2
    rms = np.sqrt((weights[:, None] * squares).sum(0) / weights.sum())
    return {
        "rows": int(weights.sum()),
        "rms": [float(value) for value in rms],
        "max": [float(value) for value in np.max([probe["max"] for probe in known], axis=0)],
    }
