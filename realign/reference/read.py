"""Reading of a run's cache; one that does not fit is refused with every field that differs."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from realign.data.records import Record
from realign.errors import RefusedError
from realign.modeling.identity import (
    Identity,
    differing_fields,
    identity_differences,
    identity_folder,
)
from realign.modeling.row_index import RowIndex
from realign.reference.probe import deviations, probe_rows, rounding
from realign.reference.reference import BatchVariance, CacheReference
from realign.reference.scoring import Scorer, free_reference
from realign.reference.store import IDENTITY, MANIFEST, Committed, read_committed, read_identity
from realign.runtime.progress import announce
from realign.runtime.ranks import Ranks

# tolerance, as a multiple of the change of a value by batching on either machine
TOLERATED_VARIANCES = 2.0


def accept_numerics(
    reference: CacheReference,
    probed: Sequence[Record],
    stored: Identity,
    needed: Identity,
    load: Callable[[], Scorer],
) -> dict[str, Any]:
    """Compute rows on this machine and compare them with the cached ones.

    The tolerance of each value is 1e-4 nats + 1e-6 of the value, plus twice the largest change of
    any probed value when its row is computed alone, on the machine of the cache or on this one.

    Args:
        reference: The cached values.
        probed: Rows of :func:`realign.reference.probe.probe_rows`.
        stored: Identity of the values.
        needed: Identity of this run.
        load: Function that loads the reference model.
    Returns:
        Facts for accepted_numerics.json: the fields that differ, the number of compared rows, and
        in nats the largest difference, the tolerance and the largest change by batching.
    Raises:
        RefusedError: A value differs by more.
    """
    scorer = load()
    batch = scorer.scoring.batch_size
    computed = np.concatenate(
        [
            scorer.score(probed[start : start + batch]).logps
            for start in range(0, len(probed), batch)
        ]
    )
    cached, alone = deviations(reference, probed, scorer)
    del scorer
    free_reference()
    computed = computed[:, : cached.shape[1]]
    moved = [float(np.abs(computed - alone).max())]
    if reference.variance is not None:
        moved.append(max(reference.variance.max))
    tolerance = rounding(computed) + TOLERATED_VARIANCES * max(moved)
    off = np.abs(cached - computed)
    differences = identity_differences(stored["numerics"], needed["numerics"])
    if (bad := off > tolerance).any():
        row, cell = (int(index) for index in np.argwhere(bad)[0])
        raise RefusedError(
            f"{bad.any(axis=1).sum()} of {len(probed)} rows must have the cached log-probabilities "
            f"here too, first: {probed[row].where}, cell {cell}, got {computed[row, cell]:.6f} "
            f"where {cached[row, cell]:.6f} is cached; {tolerance[row, cell]:.2g} nats are "
            "accepted."
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


def read_cache(
    root: Path,
    records: Sequence[Record],
    identity: Identity,
    *,
    num_cells: int | None = None,
    accepting: Callable[[], Scorer] | None = None,
    rows: RowIndex | None = None,
) -> CacheReference:
    """Return a mapping of ``record.key`` to reference log-probabilities, ``(C,)`` float64. Every
    byte of the cache is checked against its manifest.

    Args:
        root: Folder of ``realign cache``, or one identity's folder in it.
        records: The rows to return; other rows are left out.
        identity: Identity that the run requires of the values.
        num_cells: Number of cells that the run reads; imported values need not have more.
        accepting: Function that loads the reference model. With it, values that differ only in
            numerics are accepted if 64 rows computed here agree; None refuses them.
        rows: Facts of the records, if they are known.
    Raises:
        RefusedError: The cache is of another model, template, scoring or numerics (each difference
            is named), does not exist, is unfinished, damaged or of another schema, lacks a row, or
            differs between ranks.

    Example::

        >>> from pathlib import Path
        >>> import torch
        >>> from realign import Numerics, Scoring, build_cache, read_cache, read_records
        >>> scoring = Scoring(Path("model"), 3, "label", Numerics(torch.float32))
        >>> records = read_records(Path("pairs.parquet"), None)
        >>> place = build_cache(records, scoring, Path("cache"))
        >>> reference = read_cache(Path("cache"), records, scoring.identity())
        >>> reference[records[0].key].shape  # chosen, text_rejected, image_rejected
        torch.Size([3])
    """
    ranks = Ranks()
    reference, found = ranks.run_together(
        lambda: _read(
            root,
            records,
            rows or RowIndex.of(records),
            identity,
            num_cells or identity["semantics"]["cells"],
            accepting,
        )
    )
    ranks.check_agreement(found.manifest.root, root)
    return reference


def _read(
    root: Path,
    records: Sequence[Record],
    rows: RowIndex,
    identity: Identity,
    num_cells: int,
    accepting: Callable[[], Scorer] | None,
) -> tuple[CacheReference, Committed]:
    place = _find(root, identity, num_cells, is_accepting=accepting is not None)
    committed = read_committed(place)
    if committed is None:
        raise _does_not_fit(root, "it is unfinished")
    reference = CacheReference(committed.rows, BatchVariance.of(committed.manifest.probe))
    keys = rows.keys
    positions = reference.positions(keys)
    if (lacking := positions < 0).any():
        first = rows.rows[int(lacking.argmax())].id
        raise RefusedError(
            f"cache {root} lacks {lacking.sum()} of {len(keys)} rows, first: row {first}. The row "
            "was edited or added after the cache was built; run `realign cache` again."
        )
    reference = reference.only(positions)
    if committed.identity != identity:
        assert accepting is not None
        probed = {keys[index]: index for index in range(len(keys))}
        reference.acceptance = accept_numerics(
            reference,
            [records[probed[key]] for key in probe_rows(probed)],
            committed.identity,
            identity,
            accepting,
        )
    return reference, committed


@dataclass(frozen=True)
class _Candidate:
    """A folder of another identity, and the fields that differ."""

    place: Path
    fields: tuple[str, ...]
    lines: tuple[str, ...]

    def is_acceptable(self) -> bool:
        """Return whether only the numerics differ."""
        return all(name.startswith("numerics.") for name in self.fields)


def _find(root: Path, identity: Identity, num_cells: int, *, is_accepting: bool) -> Path:
    """Return the folder to read."""
    if not root.is_dir():
        raise RefusedError(
            f"cache must be a folder of `realign cache`, got {root}, which does not exist. Check "
            "--cache, or leave it out to have the references computed."
        )
    # users may pass the folder that `realign cache` prints, which is one identity's, or its --out
    is_identity = (root / IDENTITY).is_file()
    exact = identity_folder(root, identity)
    if not is_identity and (exact / MANIFEST).is_file():
        return exact
    candidates, refusals = [], []
    for path in [root / IDENTITY] if is_identity else sorted(root.glob(f"*/{IDENTITY}")):
        try:
            stored = read_identity(path.parent)
        except RefusedError as error:
            if path.parent in (root, exact):
                raise
            refusals.append(error)
            continue
        if stored == identity:
            if not (path.parent / MANIFEST).is_file():
                raise _does_not_fit(root, "it is unfinished")
            return path.parent
        candidates.append(_compare(path.parent, stored, identity, num_cells))
    if not candidates and refusals:
        raise refusals[0]
    if not candidates:
        raise _does_not_fit(root, "it is empty")
    nearest = min(candidates, key=lambda found: (not found.is_acceptable(), len(found.lines)))
    if nearest.is_acceptable() and is_accepting:
        return nearest.place
    remedy = (
        "Only the numerics differ: --accept-numerics uses it if 64 rows computed here agree."
        if nearest.is_acceptable()
        else ""
    )
    raise _does_not_fit(root, "it was computed from something else", nearest.lines, remedy)


def _compare(place: Path, stored: Identity, needed: Identity, num_cells: int) -> _Candidate:
    if "imported" in stored["numerics"]:
        stored_cells = stored["semantics"]["cells"]
        if num_cells <= stored_cells < needed["semantics"]["cells"]:
            needed = {**needed, "semantics": {**needed["semantics"], "cells": stored_cells}}
    fields = tuple(name for name, *_ in differing_fields(stored, needed))
    return _Candidate(place, fields, tuple(identity_differences(stored, needed)))


def _does_not_fit(
    root: Path, reason: str, lines: Sequence[str] = (), remedy: str = ""
) -> RefusedError:
    detail = "".join(f"\n  {line}" for line in lines)
    remedies = "\n".join(part for part in (remedy, "Run `realign cache` for this model.") if part)
    return RefusedError(f"cache {root} does not fit this run: {reason}.{detail}\n{remedies}")
