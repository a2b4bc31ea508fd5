"""The protocol of a backend: its tiles and dtypes, a product, and small kernels around it.

Says what goes in and out; knows no backend.  Letters: **N** rows, **D** hidden size, **V**
vocabulary of this shard, **r** rank.  Ids of tokens are those of the shard.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, NamedTuple, Protocol

from torch import Tensor

if TYPE_CHECKING:
    import torch

    from realign_kernels.head import LogitTransform
    from realign_kernels.objective import Objective
    from realign_kernels.tiling import TileShape


class RowState(NamedTuple):
    """Sums of the pass over the vocabulary for every row, (N,) each.

    With x the transformed logits and e = exp(x - shift), sums run over every column but the label's
    and, where ``top_ids`` is tracked, but the top one's.
    """

    shift: Tensor
    rest_sum: Tensor  # of e
    logit_sum: Tensor | None = None  # of x, over every column
    label_logits: Tensor | None = None  # x at the label as the tiles have it
    rest_entropy_sum: Tensor | None = None  # of -e * log(e)
    rest_square_sum: Tensor | None = None  # of e ** 2
    top_logits: Tensor | None = None  # largest x except the label's
    top_ids: Tensor | None = None  # int64, where it is reached first
    released_ids: Tensor | None = None  # int64, the token that a tile's top one has replaced, or -1
    released_values: Tensor | None = None  # its e * phi


@dataclass(frozen=True, slots=True)
class Tile:
    """One tile of raw logits, (rows, columns), and all that is done with it."""

    logits: Tensor  # overwritten
    exponentials: Tensor | None  # out: e * phi, 0 where left out; may be `logits` itself
    first_column: int
    bias: Tensor | None  # (columns,)
    labels: Tensor  # (rows,); outside of the tile where another has the label
    transform: LogitTransform
    bound: float  # an x more than this above the shift moves the shift
    state: RowState
    tile_shift: Tensor | None = None  # out: what the exponentials are relative to
    accumulator: Tensor | None = None  # (rows, D), rescaled where the shift moves
    low_rank_accumulator: Tensor | None = None  # (rows, r), the same
    replays: bool = False  # shifts are final and nothing is summed


class PairBatch(NamedTuple):
    """A preference batch before its reduction."""

    token_logps: Tensor  # (tokens,) or (S, T), contiguous
    labels: Tensor
    ignore_index: int
    sequence_ids: Tensor | None  # (tokens,)
    num_cells: int
    num_pairs: int
    ref_logps: Tensor | None  # (C, P), float64
    objective: Objective


class PairResults(NamedTuple):
    """Tensors that a preference batch is reduced into; float64 except the counts."""

    loss: Tensor  # (1,)
    logps: Tensor  # (C, P)
    counts: Tensor  # (C, P), int64
    rewards: Tensor  # (C, P)
    text_margins: Tensor  # (P,)
    image_margins: Tensor  # (P,)
    coefficients: Tensor  # (C, P): derivative of the loss in logps


class KernelSet(Protocol):
    """A module of kernels; every one is deterministic and waits for no device.

    It may also state ``STRIDE_MULTIPLE``: rows of tiles and of E lie a multiple of so many elements
    apart.
    """

    LARGEST_TILE: TileShape  # where the workspace allows it
    TEMPORARIES: int  # tiles of the accumulation dtype that the epilogue makes for itself

    def operand_dtype(
        self, computed: torch.dtype, rounded: torch.dtype, *, is_given: bool
    ) -> torch.dtype:
        """Return the dtype of hidden states and weight in products.

        ``computed`` is what sums are taken in, ``rounded`` what the weight is given in or rounded
        to by autocast.  ``is_given`` says that hidden states and weight are both given in it, so
        that their gradients are rounded to it too.
        """

    def exponential_dtype(self, computed: torch.dtype, operand: torch.dtype) -> torch.dtype:
        """Return the dtype of exponentials, which is one of the two."""

    def expect_writes(self, tensor: Tensor) -> None:
        """Prepare a tensor that may be large, and has not been written to, for being filled."""

    def product(self, out: Tensor, a: Tensor, b: Tensor, *, adds: bool) -> None:
        """Set ``out`` to ``a @ b``, or add it, summed and stored in the dtype of ``out``."""

    def exponential_product(
        self,
        out: Tensor,
        exponentials: Tensor,
        b: Tensor,
        totals: Tensor,
        *,
        scale: Tensor | None = None,
        adds: bool,
    ) -> None:
        """Set ``out`` to ``exponentials @ b``, or add it, where ``b`` is narrower.

        With a scale (rows,) it is ``(scale * exponentials).T @ b``.  Exponentials that are no small
        part of their row's total keep all digits.
        """

    def epilogue(self, tile: Tile) -> None:
        """Fold a tile of logits into the sums of its rows."""

    def label_dot(self, hidden: Tensor, weight: Tensor, ids: Tensor, out: Tensor) -> None:
        """Add ``hidden[n] . weight[ids[n]]`` to ``out[n]`` where the id is a row of the weight."""

    def combine(
        self, accumulator: Tensor, scale: Tensor, weight: Tensor, ids: Tensor, coefficient: Tensor
    ) -> None:
        """Set a row to ``scale * row + coefficient * weight[id]``, the latter where id is a row."""

    def add_entries(
        self, out: Tensor, starts: Tensor, order: Tensor, coefficient: Tensor, hidden: Tensor
    ) -> None:
        """Add the entries ``order[starts[v]:starts[v + 1]]`` to row v of ``out``.

        Entry e is ``coefficient[e] * hidden[e % N]``.
        """

    def pair_loss(self, batch: PairBatch, results: PairResults) -> None:
        """Fill in the results of a preference batch."""
