"""Tiles of rows and vocabulary whose scratch stays within a budget.

The shape depends on the head and the budget, not on the number of vocabulary entries: splitting
the vocabulary over ranks leaves every row's order of summation as it was.  Nor does it depend on
the number of rows, so that adding some to a batch changes no other; but for backends that ask for
tiles that fit (GPUs), where it depends on the power of two above that number.
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
    """Return a tile as large as ``largest``, wider where there are few rows.

    Rows are counted in powers of two: within one, the order of summation stays as it is. Without
    ``num_rows`` it stays so for any number of rows.
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
    """Return the largest tile within the budget, of those that are no larger than ``largest``.

    Scratch for one tile: logits, as many temporaries as its kernels make and, where they have
    another dtype, the exponentials; of the head what is cast, its low-rank factor, and its gradient
    until that is rounded.  ``itemsizes`` are those of accumulation, of operands and of
    exponentials.
    """
    rows, columns = largest
    accumulation, operand, exponential = itemsizes
    per_logit = accumulation * (1 + temporaries)
    if exponential != accumulation:
        # low-rank products take the exponentials widened again
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
    least = per_logit + 2 * gradient  # of the backward too, so that it is refused beforehand
    if workspace_bytes < least:
        raise ValueError(
            f"workspace_bytes must be >= {least} to hold one logit of hidden size {hidden_size}, "
            f"got {workspace_bytes}. Leave it out for the default."
        )
    return TileShape(rows, columns)


def padded_rows(num_rows: int, shape: TileShape) -> int:
    """Return a number of rows that leaves no block with only a few.

    A row's result then does not depend on the number of others.
    """
    rest = num_rows % shape.rows
    least = min(LEAST_ROWS, shape.rows)
    return num_rows if rest == 0 or rest >= least else num_rows - rest + least


def row_stride(columns: int, multiple: int) -> int:
    """Return how many elements rows of ``columns`` lie apart, so that each of them is aligned."""
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
