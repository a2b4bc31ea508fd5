"""How rows and vocabulary are cut so that scratch stays within a budget.  Knows sizes, no maths.

The shape depends on the head and the budget, never on the number of rows or of vocabulary entries:
adding rows to a batch, or splitting the vocabulary over ranks, leaves every other row's order of
summation as it was.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, NamedTuple

if TYPE_CHECKING:
    from collections.abc import Iterator

# Past this many rows a GEMM gains nothing from more, and wider tiles save rereads of the hidden
# states.
_MAX_ROWS = 1024

# Row vectors alive beside a tile: positions, labels, shifts, masks and partial sums, 8 bytes each.
_ROW_VECTOR_BYTES = 16 * 8


class TileShape(NamedTuple):
    """Rows of hidden states by columns of vocabulary handled at a time."""

    rows: int
    columns: int


def scratch_bytes(shape: TileShape, hidden_size: int, rank: int, itemsize: int) -> int:
    """Return the scratch alive at once for one tile, forward or backward, in bytes.

    Three (rows, columns) tiles (logits, exponentials, one temporary of the statistics), the upcast
    head tile with its gradient, the gathered hidden rows with their upcast copy, the low-rank
    factor A, and vectors.
    """
    rows, columns = shape
    width = hidden_size + rank
    elements = (
        3 * rows * columns + 2 * columns * (width + 1) + 2 * rows * width + rank * hidden_size
    )
    return elements * itemsize + rows * _ROW_VECTOR_BYTES


def tile_shape(hidden_size: int, rank: int, itemsize: int, workspace_bytes: int) -> TileShape:
    """Return the tallest tile within the budget that is four times as wide, or the widest row."""
    rows = _MAX_ROWS
    while (
        rows > 1
        and _columns_that_fit(rows, hidden_size, rank, itemsize, workspace_bytes) < 4 * rows
    ):
        rows //= 2
    columns = _columns_that_fit(rows, hidden_size, rank, itemsize, workspace_bytes)
    if columns < 1:
        least = scratch_bytes(TileShape(1, 1), hidden_size, rank, itemsize)
        raise ValueError(
            f"workspace_bytes must be >= {least} to hold one logit of hidden size {hidden_size}, "
            f"got {workspace_bytes}."
        )
    return TileShape(rows, columns)


def _columns_that_fit(
    rows: int, hidden_size: int, rank: int, itemsize: int, workspace_bytes: int
) -> int:
    none = scratch_bytes(TileShape(rows, 0), hidden_size, rank, itemsize)
    one = scratch_bytes(TileShape(rows, 1), hidden_size, rank, itemsize)
    return (workspace_bytes - none) // (one - none)


def spans(total: int, size: int) -> Iterator[slice]:
    """Cut ``range(total)`` into slices of at most ``size``."""
    for start in range(0, total, size):
        yield slice(start, min(start + size, total))
