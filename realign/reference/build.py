"""Building of caches, shard by shard; a killed build continues where it stopped.

Shards are whole batches and each rank computes whole shards, so a row is computed in the same batch
whatever the shard size and the number of processes.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager, nullcontext
from pathlib import Path

from realign.data.records import Record
from realign.errors import RefusedError
from realign.modeling.identity import (
    Identity,
    identity_differences,
    identity_folder,
    identity_sha256,
)
from realign.modeling.row_index import RowIndex
from realign.reference.probe import probe_rows, run_probe
from realign.reference.reference import CacheReference
from realign.reference.scoring import Scorer, Scoring, free_reference
from realign.reference.shards import MAX_ROWS, DamagedError, Rows, write_shard
from realign.reference.store import LockedCache, building, read_committed
from realign.runtime.progress import Progress
from realign.runtime.ranks import Ranks

PIXEL_INTERVAL = 256  # one row in so many has its pixels compared in training


def build_cache(
    records: Sequence[Record],
    scoring: Scoring,
    root: Path,
    *,
    shard_size: int = 1024,
    identity: Identity | None = None,
    ranks: Ranks | None = None,
    rows: RowIndex | None = None,
) -> Path:
    """Compute the rows that a cache lacks, commit them, and return the identity's folder.

    Args:
        records: The rows; equal ones are computed once.
        scoring: Settings of the scoring.
        root: The cache folder, which may hold other identities too.
        shard_size: Rows per shard, rounded up to whole batches.
        identity: Identity of the values of ``scoring``, if it is known.
        ranks: The processes that share the work; those of the launcher by default.
        rows: Facts of the records, from :func:`realign.modeling.row_checks.check_rows`, if they are
            known.
    Raises:
        RefusedError: Two rows have one id and different content; a row is too long; the folder
            cannot be written; or the probe finds wrong values.
        FloatingPointError: A log-probability is not finite; nothing of its shard is stored.

    Example::

        >>> from pathlib import Path
        >>> import torch
        >>> from realign import Numerics, Scoring, build_cache, read_records
        >>> scoring = Scoring(Path("model"), 3, "label", Numerics(torch.float32))
        >>> records = read_records(Path("pairs.parquet"), None)
        >>> place = build_cache(records, scoring, Path("cache"))
        >>> (place / "manifest.json").is_file()
        True
    """
    identity, ranks = identity or scoring.identity(), ranks or Ranks()
    _check_agreement(identity, ranks)
    place = identity_folder(root, identity)
    wanted = ranks.run_together(lambda: _unique(records, rows or RowIndex.of(records)))
    found = ranks.gather((_has_all(place, wanted), place.exists()))
    if all(has_all for has_all, _ in found):
        return place
    # loading may refuse the model, so it comes before anything is written
    scorer = None if any(exists for _, exists in found) else ranks.run_together(scoring.load)
    with _locked(place, ranks):
        plan = ranks.run_together(
            lambda: _plan(place, identity, wanted) if ranks.is_first else None
        )
        ranks.check_folder_is_shared(place)
        # the first rank decides for all: a shared file system may lag behind on other machines
        missing, first = ranks.gather(plan)[0] or ([], 0)
        if missing and scorer is None:
            scorer = ranks.run_together(scoring.load)

        def write() -> None:
            if missing:
                assert scorer is not None
                _write(records, missing, first, place, identity, scorer, shard_size, ranks)

        ranks.run_together(write)
        ranks.run_together(
            lambda: (
                _commit(records, wanted, place, identity, scorer or scoring.load())
                if ranks.is_first
                else None
            )
        )
    scorer = None
    free_reference()
    return place


def _check_agreement(identity: Identity, ranks: Ranks) -> None:
    """Refuse ranks on machines that compute differently."""
    for rank, other in enumerate(ranks.gather(identity)):
        if lines := identity_differences(other, identity):
            raise RefusedError(
                f"ranks must compute alike, got on rank {rank} (cached) and rank {ranks.rank} "
                "(needed):"
                + "".join(f"\n  {line}" for line in lines)
                + "\nUse machines of one kind, with the same packages."
            )


def _unique(records: Sequence[Record], rows: RowIndex) -> dict[str, int]:
    """Map each key to the position of the first row that has it."""
    wanted: dict[str, int] = {}
    ids: dict[str, str] = {}
    for index, row in enumerate(rows.rows):
        if ids.setdefault(row.id, row.key) != row.key:
            first = wanted[ids[row.id]]
            raise RefusedError(
                f"{records[index].where}: id must be unique, got {row.id!r} again with other "
                f"content, first in row {first + 1} (counting from 1). Rename one."
            )
        wanted.setdefault(row.key, index)
    return wanted


def _has_all(place: Path, wanted: dict[str, int]) -> bool:
    """Return whether a folder has all rows. A damaged one has not, and the build repairs it."""
    try:
        committed = read_committed(place)
    except DamagedError:
        return False
    if committed is None:
        return False
    return bool((CacheReference(committed.rows).positions(list(wanted)) >= 0).all())


@contextmanager
def _locked(place: Path, ranks: Ranks) -> Iterator[None]:
    """Hold the builder's lock on rank 0, for all ranks."""
    with ExitStack() as stack:
        ranks.run_together(lambda: stack.enter_context(building(place)) if ranks.is_first else None)
        yield


def _plan(place: Path, identity: Identity, wanted: dict[str, int]) -> tuple[list[int], int]:
    """Return the positions of the rows to compute, and the number of the first new shard."""
    work = LockedCache.open(place, identity, repairs=True)
    return _missing(wanted, work), work.next_index


def _missing(wanted: dict[str, int], work: LockedCache) -> list[int]:
    keys = list(wanted)
    found = CacheReference(work.rows).positions(keys)
    return [wanted[key] for key, position in zip(keys, found, strict=True) if position < 0]


def _write(
    records: Sequence[Record],
    missing: list[int],
    first_shard: int,
    place: Path,
    identity: Identity,
    scorer: Scorer,
    shard_size: int,
    ranks: Ranks,
) -> None:
    """Score this rank's share of the missing rows, and write it shard by shard."""
    batch = scorer.scoring.batch_size
    share = min(shard_size, math.ceil(len(missing) / ranks.world_size), MAX_ROWS - batch + 1)
    size = math.ceil(share / batch) * batch
    shards = list(enumerate(range(0, len(missing), size), start=first_shard))
    mine = shards[ranks.rank :: ranks.world_size]
    total = sum(min(size, len(missing) - start) for _, start in mine)
    with Progress("cache", total) if ranks.is_first else nullcontext() as progress:
        for number, start in mine:
            parts = []
            for first in range(start, min(start + size, len(missing)), batch):
                indices = missing[first : min(first + batch, start + size)]
                parts.append(scorer.score([records[index] for index in indices]))
                if progress:
                    progress.advance(len(indices))
            rows = Rows.concat(parts, scorer.scoring.cells)
            for index in range(0, len(rows), PIXEL_INTERVAL):
                record = records[missing[start + index]]
                rows.pixel_digest[index] = scorer.pixel_digests(record)
            write_shard(place, rows, identity_sha256(identity), number)


def _commit(
    records: Sequence[Record],
    wanted: dict[str, int],
    place: Path,
    identity: Identity,
    scorer: Scorer,
) -> None:
    """Read the shards back, probe them, and write the manifest."""
    work = LockedCache.open(place, identity, repairs=False)
    if lost := _missing(wanted, work):
        raise RefusedError(
            f"{place} must hold every row, lacks {len(lost)} that were written, first: "
            f"{records[lost[0]].where}. Check the file system, and run the same command again."
        )
    probed = [records[wanted[key]] for key in probe_rows(wanted)]
    probe = run_probe(CacheReference(work.rows), probed, scorer, identity)
    work.commit(probe)
