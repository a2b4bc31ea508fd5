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

# The fused backends' tiles, where the budget allows: on a CPU one stays in the caches between the
# product and the epilogue; on a GPU it feeds every multiprocessor and few launches are needed.
_FUSED_SHAPES = {"cpu": (512, 2048), "cuda": (4096, 8192)}

# A BLAS multiplies very few rows by other kernels, which sum in another order.
LEAST_ROWS = 64

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


def fused_tile_shape(
    device_type: str,
    hidden_size: int,
    rank: int,
    itemsizes: tuple[int, int],
    workspace_bytes: int,
    *,
    casts_head: bool,
    sums_head_gradient: bool,
) -> TileShape:
    """Return the largest tile of the fused backends within the budget.

    Scratch for one tile: logits and, where products take another dtype than they give, the
    exponentials; of the head what is cast, its low-rank factor, and its gradient until that is
    rounded.  ``itemsizes`` are those of accumulation and of operands.
    """
    rows, columns = _FUSED_SHAPES.get(device_type, _FUSED_SHAPES["cuda"])
    accumulation, operand = itemsizes
    per_logit = accumulation
    if operand != accumulation:
        # low-rank products take the exponentials widened again
        per_logit += operand + (accumulation if rank else 0)
    gradient = accumulation * (hidden_size + rank + 1)
    per_column = 2 * accumulation * rank  # cast, then scaled
    per_column += operand * hidden_size if casts_head else 0
    per_column += gradient if sums_head_gradient else 0
    while columns > 1 and columns * (rows * per_logit + per_column) > workspace_bytes:
        if rows > LEAST_ROWS and columns <= 4 * rows:
            rows //= 2
        else:
            columns //= 2
    while rows > 1 and columns * (rows * per_logit + per_column) > workspace_bytes:
        rows //= 2
    least = per_logit + 2 * gradient  # of the backward too, so that it is refused beforehand
    if workspace_bytes < least:
        raise ValueError(
            f"workspace_bytes must be >= {least} to hold one logit of hidden size {hidden_size}, "
            f"got {workspace_bytes}."
        )
    return TileShape(rows, columns)


def padded_rows(num_rows: int, shape: TileShape) -> int:
    """Return the number of rows that leaves no block with only a few.

    So a row's result does not depend on how many others there are.
    """
    rest = num_rows % shape.rows
    least = min(LEAST_ROWS, shape.rows)
    return num_rows if rest == 0 or rest >= least else num_rows - rest + least


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
