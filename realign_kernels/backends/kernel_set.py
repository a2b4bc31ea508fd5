"""The protocol of a backend: its tiles and dtypes, a product, and small kernels around it.

It states inputs and outputs, and imports no backend. Letters: **N** rows, **D** hidden size, **V**
vocabulary of this shard, **r** rank. Token ids are those of the shard.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, NamedTuple, Protocol

from torch import Tensor

if TYPE_CHECKING:
    import torch

    from realign_kernels.head import Head, LogitTransform
    from realign_kernels.objective import Objective
    from realign_kernels.tiling import TileShape


class RowState(NamedTuple):
    """Sums of the pass over the vocabulary for every row, (N,) each.

    With x the transformed logits and e = exp(x - shift), sums run over all columns except that of
    the label and, where ``top_ids`` is tracked, that of the top token.
    """

    shift: Tensor
    rest_sum: Tensor  # of e
    logit_sum: Tensor | None = None  # of x, over every column
    label_logits: Tensor | None = None  # x at the label, as computed in the tiles
    rest_entropy_sum: Tensor | None = None  # of -e * log(e)
    rest_square_sum: Tensor | None = None  # of e ** 2
    top_logits: Tensor | None = None  # largest x except the label's
    top_ids: Tensor | None = None  # int64, the lowest id that has it
    released_ids: Tensor | None = None  # int64, the former top token that a tile replaced, or -1
    released_values: Tensor | None = None  # its e * phi


@dataclass(frozen=True, slots=True)
class Tile:
    """One tile of raw logits, (rows, columns), with the inputs and outputs of its kernels."""

    logits: Tensor  # overwritten
    exponentials: Tensor | None  # out: e * phi, 0 where left out; may be `logits` itself
    first_column: int
    bias: Tensor | None  # (columns,)
    labels: Tensor  # (rows,); outside the tile where another tile has the label
    transform: LogitTransform
    bound: float  # an x more than this above the shift moves the shift
    state: RowState
    tile_shift: Tensor | None = None  # out: the shift that the exponentials are relative to
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
    ref_logps: Tensor | None  # (C, P), of any floating dtype and layout
    objective: Objective
    lengths: Tensor | None = None  # (C, P), contiguous: the expected counts, if they are checked


class PairResults(NamedTuple):
    """Tensors that a preference batch is reduced into; floating ones have any floating dtype."""

    loss: Tensor  # (), or one element
    logps: Tensor  # (C, P)
    counts: Tensor  # (C, P), int64
    rewards: Tensor  # (C, P)
    text_margins: Tensor  # (P,)
    image_margins: Tensor  # (P,)
    coefficients: Tensor  # (C, P): derivative of the loss with respect to logps


class PairGradient(NamedTuple):
    """The gradient of a preference batch, before it is spread over the tokens."""

    grad_loss: Tensor | None  # ()
    grad_logps: Tensor | None  # (C, P)
    coefficients: Tensor  # (C, P), contiguous
    labels: Tensor  # of any shape, contiguous
    sequence_ids: Tensor | None  # None: the rows of `labels`
    ignore_index: int


class FoundRows(NamedTuple):
    """Positions of the labels that are scored, and the outcome of the checks."""

    positions: Tensor  # (N,) int64, ascending
    scores: Tensor  # (M,), zeros
    labels_fit: Tensor  # () bool: all labels are tokens or ignored
    number_fits: Tensor | None  # () bool: there are as many as the caller stated


class StartedRows(NamedTuple):
    """The rows that carry a label, gathered, before the first tile."""

    hidden: Tensor  # (rows, D), in the dtype of products
    ids: Tensor  # (rows,), token id of the label
    numbers: Tensor  # (3, rows): x at the label, shift, sum of the other exponentials


class RowKernels(Protocol):
    """Work that is done once per call, one launch each, for a whole vocabulary without LoRA.

    For backends without them, ``fused/`` and ``ops/`` compute the same with PyTorch's operators.
    """

    MOST_POSITIONS: int  # largest number of labels that `find_rows` is used for

    def find_rows(
        self,
        labels: Tensor,
        ignore_index: int,
        vocabulary_size: int,
        num_rows: int | None,
        dtype: torch.dtype,
    ) -> FoundRows:
        """Find the labels (M,) that are scored; wait for their number only if it is None."""

    def start_rows(
        self,
        head: Head,
        transform: LogitTransform,
        hidden_states: Tensor,
        labels: Tensor,
        positions: Tensor,
        total_rows: int,
        *,
        with_numbers: bool,
    ) -> StartedRows:
        """Gather the rows at ``positions`` of ``hidden_states`` (..., D), followed by empty rows.

        Without ``with_numbers``, the numbers stay uninitialised.
        """

    def finish_rows(
        self,
        head: Head,
        transform: LogitTransform,
        started: StartedRows,
        positions: Tensor | None,
        accumulator: Tensor | None,
        scores: Tensor,
    ) -> None:
        """Write the scores to their positions, and turn ``E @ W`` into their derivative.

        Without positions, ``scores`` has one entry per row.
        """

    def grade_rows(
        self,
        transform: LogitTransform,
        numbers: Tensor,
        upstream: Tensor,
        positions: Tensor | None,
    ) -> tuple[Tensor, Tensor]:
        """Return the gradient of the raw logits: the factor of E, and the entry at the label.

        ``upstream`` has one entry per position or, without positions, one per row.
        """

    def rescale_rows(self, matrix: Tensor, old_shift: Tensor, new_shift: Tensor) -> None:
        """Rescale rows of E from the old shift to the new one."""

    def spread_rows(
        self, upstream: Tensor | None, rows: Tensor, positions: Tensor, out: Tensor
    ) -> None:
        """Set rows ``positions[n]`` of ``out`` to ``upstream[positions[n]] * rows[n]``.

        All other rows are set to 0.  Without ``upstream``, its entries count as 1.
        """

    def spread_gradient(self, gradient: PairGradient, out: Tensor) -> None:
        """Set every scored token of ``out`` to the gradient of its sequence, any other to 0."""


class ProductKernels(Protocol):
    """Products of hidden states and weight whose sums are bounded, beside those of a BLAS.

    Tensor cores truncate their sums; here partial sums are added in float32, which rounds to
    nearest, before they grow long.
    """

    def is_faster(self, operand: torch.dtype, device: torch.device) -> bool:
        """Return whether :meth:`fused_product` is faster than a BLAS followed by an epilogue."""

    def exact_product(
        self,
        out: Tensor,
        hidden: Tensor,
        weight: Tensor,
        low_rank: tuple[Tensor, Tensor] | None = None,
    ) -> None:
        """Set ``out``, float32, to ``hidden @ weight.T``.

        The product of ``low_rank``, (rows, K) and (columns, K) of the same dtype, is added.
        """

    def fused_product(
        self,
        tile: Tile,
        hidden: Tensor,
        weight: Tensor,
        low_rank: tuple[Tensor, Tensor] | None = None,
    ) -> None:
        """Compute the logits of a tile and fold them into the sums of its rows.

        The logits are never stored. No statistics are taken, and no top token is tracked.
        """


class KernelSet(Protocol):
    """A module of kernels, which are deterministic and never wait for a device.

    It may also have ``STRIDE_MULTIPLE``, of which the strides of rows of tiles and of E are a
    multiple; ``FITS_TILES``, which gives few rows wider tiles, and so another order of summation;
    ``ROW_KERNELS``, for devices whose launches cost more than the work; and ``PRODUCT_KERNELS``,
    for devices whose products truncate sums.
    """

    LARGEST_TILE: TileShape  # where the workspace allows it
    TEMPORARIES: int  # tiles of the accumulation dtype that the epilogue makes for itself

    def operand_dtype(
        self, computed: torch.dtype, rounded: torch.dtype, *, is_given: bool
    ) -> torch.dtype:
        """Return the dtype of hidden states and weight in products.

        ``computed`` is the dtype of sums, ``rounded`` that in which the weight is given or to which
        it is rounded.  ``is_given`` says that hidden states and weight are both given in the
        latter, so that their gradients are rounded to it too.
        """

    def exponential_dtype(self, computed: torch.dtype, operand: torch.dtype) -> torch.dtype:
        """Return the dtype of exponentials, which is one of the two."""

    def expect_writes(self, tensor: Tensor) -> None:
        """Prepare a tensor, possibly a large one, that is about to be written the first time."""

    def product(self, out: Tensor, a: Tensor, b: Tensor, *, adds: bool) -> None:
        """Set ``out`` to ``a @ b``, or add that, summed and stored in the dtype of ``out``."""

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
        """Set ``out`` to ``exponentials @ b``, or add that, where ``b`` has a narrower dtype.

        With a scale (rows,) the product is ``(scale * exponentials).T @ b``.  Exponentials that are
        a large part of their row's total keep all digits.
        """

    def epilogue(self, tile: Tile) -> None:
        """Fold a tile of logits into the sums of its rows."""

    def label_dot(self, hidden: Tensor, weight: Tensor, ids: Tensor, out: Tensor) -> None:
        """Add ``hidden[n] . weight[ids[n]]`` to ``out[n]`` where the id is a row of the weight."""

    def combine(
        self, accumulator: Tensor, scale: Tensor, weight: Tensor, ids: Tensor, coefficient: Tensor
    ) -> None:
        """Set each row to ``scale * row + coefficient * weight[id]``; invalid ids add nothing."""

    def add_entries(
        self, out: Tensor, starts: Tensor, order: Tensor, coefficient: Tensor, hidden: Tensor
    ) -> None:
        """Add the entries ``order[starts[v]:starts[v + 1]]`` to row v of ``out``.

        Entry e is ``coefficient[e] * hidden[e % N]``.
        """

    def pair_loss(self, batch: PairBatch, results: PairResults) -> Tensor | None:
        """Fill in the results of a preference batch.

        Returns whether all ids are in range, and whether the counts equal the lengths, (2,) bool;
        None if the caller has to check.
        """
