"""Tiles of rows and vocabulary whose scratch stays within a budget.

The shape depends on the head and the budget, not on the size of the vocabulary: splitting the
vocabulary over ranks leaves the order of summation in every row as it was.  It does not depend on
the number of rows either, so that adding rows to a batch changes no other row.  Only backends with
``FITS_TILES`` (GPUs) make it depend on that number, rounded up to a power of two.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, NamedTuple

if TYPE_CHECKING:
    from collections.abc import Iterator

    from torch import Tensor

# A BLAS multiplies very few rows by other kernels, which sum in another order.
LEAST_ROWS = 64


class TileShape(NamedTuple):
    """Rows of hidden states by columns of vocabulary handled at a time."""

    rows: int
    columns: int


def fitted(largest: TileShape, num_rows: int | None) -> TileShape:
    """Return a tile as large as ``largest``, but wider where there are few rows.

    The number of rows is rounded up to a power of two: batches of the same power have the same
    order of summation. Without ``num_rows`` all batches have it.
    """
    if num_rows is None:
        return largest
    rows = 1 << max(0, num_rows - 1).bit_length()
    rows = min(largest.rows, max(LEAST_ROWS, rows))
    return TileShape(rows, largest.rows * largest.columns // rows)


def tile_shape(
    largest: TileShape,
    hidden_size: int,
    rank: int,
    itemsizes: tuple[int, int, int],
    workspace_bytes: int,
    *,
    temporaries: int,
    casts_head: bool,
    sums_head_gradient: bool,
) -> TileShape:
    """Return the largest tile that fits the budget and is no larger than ``largest``.

    The scratch of a tile is its logits, the temporaries of its kernels and, if they have another
    dtype, its exponentials; for its part of the head, the cast weight, the low-rank factor, and the
    gradient before it is rounded.  ``itemsizes`` are those of accumulation, operands and
    exponentials.
    """
    rows, columns = largest
    accumulation, operand, exponential = itemsizes
    per_logit = accumulation * (1 + temporaries)
    if exponential != accumulation:
        # low-rank products take a wide copy of the exponentials
        per_logit += exponential + (accumulation if rank else 0)
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
    # With the gradient, so that the forward refuses what the backward would.
    least_bytes = per_logit + 2 * gradient
    if workspace_bytes < least_bytes:
        raise ValueError(
            f"workspace_bytes must be >= {least_bytes} to hold one logit of hidden size "
            f"{hidden_size}, got {workspace_bytes}. Leave it out for the default."
        )
    return TileShape(rows, columns)


def padded_rows(num_rows: int, shape: TileShape) -> int:
    """Return the number of rows with padding, so that the last block has enough of them.

    A row's result then does not depend on the number of other rows.
    """
    last_rows = num_rows % shape.rows
    least = min(LEAST_ROWS, shape.rows)
    return num_rows if last_rows == 0 or last_rows >= least else num_rows - last_rows + least


def row_stride(columns: int, multiple: int) -> int:
    """Return the stride in elements that aligns every row of ``columns`` elements."""
    return -(-columns // multiple) * multiple


def with_stride(buffer: Tensor, shape: tuple[int, int], multiple: int) -> Tensor:
    """View the start of a flat buffer as a matrix whose rows are aligned."""
    rows, columns = shape
    stride = row_stride(columns, multiple)
    return buffer[: rows * stride].view(rows, stride)[:, :columns]


def spans(total: int, size: int) -> Iterator[slice]:
    """Cut ``range(total)`` into slices of at most ``size``."""
    for start in range(0, total, size):
        yield slice(start, min(start + size, total))
