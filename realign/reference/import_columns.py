"""Import of another trainer's log-probabilities, from parquet columns with TRL's names.

The numerics of these values are unknown, so a run accepts them only with accept_numerics, after
computing 64 rows again.
"""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow.parquet
import torch
from pyarrow import types

from realign.data.dataset import read_records
from realign.errors import RefusedError
from realign.modeling.acceleration import Numerics
from realign.modeling.folder import resolve_model
from realign.modeling.identity import identity_folder
from realign.modeling.row_checks import check_rows
from realign.reference.scoring import RowReader, Scoring
from realign.reference.shards import Rows
from realign.reference.store import LockedCache, building
from realign.runtime.run_folder import check_out

# the first two are TRL's
COLUMNS = (
    "ref_chosen_logps",
    "ref_rejected_logps",
    "ref_image_rejected_logps",
    "ref_both_rejected_logps",
)


def import_columns(data: Path, model: str, out: Path) -> Path:
    """Make a cache from the columns ``ref_chosen_logps`` and ``ref_rejected_logps``, and from
    ``ref_image_rejected_logps`` and ``ref_both_rejected_logps`` if they exist. Return its folder.

    Args:
        data: Parquet dataset that has these columns, or a folder with ``dataset.parquet``.
        model: Model that computed the values: folder or hub id.
        out: Cache folder.
    Raises:
        RefusedError: A column is missing, or holds a value that is not a log-probability.
    """
    check_out(out)
    folder = resolve_model(model)
    file = data / "dataset.parquet" if data.is_dir() else data
    if file.suffix != ".parquet":
        raise RefusedError(
            f"data must be a parquet file to import columns from, got {data}. Name the dataset "
            "that holds them."
        )
    records = read_records(file, None)
    logps = _read_columns(file, len(records))
    scoring = Scoring(folder, logps.shape[1], "label", Numerics(torch.float32))
    check_rows(records, scoring.model.processor, cells=scoring.cells, max_length=None)
    identity = scoring.identity()
    identity["numerics"] = {"imported": ", ".join(COLUMNS[: logps.shape[1]])}
    place = identity_folder(out, identity)
    reader = RowReader(scoring.model.processor, scoring.cells)
    rows = Rows.concat([reader.read([record])[1] for record in records], scoring.cells)
    rows = replace(rows, logps=np.where(rows.num_tokens > 0, logps, 0.0))
    with building(place):
        work = LockedCache.open(place, identity, repairs=True)
        work.add(rows)
        work.commit(None)
    return place


def _read_columns(file: Path, num_rows: int) -> np.ndarray:
    """Return the log-probabilities, shape ``(rows, C)``."""
    schema = pyarrow.parquet.read_schema(file)
    columns = [name for name in COLUMNS if name in schema.names]
    if columns[:2] != list(COLUMNS[:2]) or columns != list(COLUMNS[: len(columns)]):
        raise RefusedError(
            f"{file} must have the columns {COLUMNS[0]} and {COLUMNS[1]} (then {COLUMNS[2]} and "
            f"{COLUMNS[3]}), got {columns or 'none of them'}. Add them."
        )
    for name in columns:
        kind = schema.field(name).type
        if not (types.is_floating(kind) or types.is_integer(kind) or types.is_decimal(kind)):
            raise RefusedError(
                f"{file}: {name} must be a column of numbers, one summed log-probability per row, "
                f"got {kind}. Sum over the tokens of the answer."
            )
    table = pyarrow.parquet.read_table(file, columns=columns)
    values: Any = np.stack(
        [table[name].to_numpy(zero_copy_only=False).astype(np.float64) for name in columns], axis=1
    )
    if len(values) != num_rows:
        raise RefusedError(
            f"{file} must have one value per row, got {len(values)} for {num_rows} rows. Compute "
            "the others."
        )
    bad = ~(np.isfinite(values) & (values <= 0))
    if bad.any():
        row, cell = (int(index) for index in np.argwhere(bad)[0])
        raise RefusedError(
            f"{file}, row {row + 1} (counting from 1): {columns[cell]} must be a summed log-"
            f"probability, finite and not positive, got {values[row, cell]}. Compute it again."
        )
    return values
