"""The C++ kernels of ``csrc/``, called with the pointers of tensors.

The library is next to the package, or where an editable installation has put it, and is loaded at
the first call. This module does not use autograd, and its callers have checked all arguments.
"""

from __future__ import annotations

import ctypes
import functools
import importlib.util
from ctypes import POINTER, Structure, byref, c_char_p, c_double, c_int32, c_int64, c_void_p
from typing import TYPE_CHECKING, ClassVar

import torch
from torch import Tensor

from realign_kernels.tiling import TileShape, spans

if TYPE_CHECKING:
    from realign_kernels.backends.kernel_set import PairBatch, PairResults, Tile

# A tile stays in the caches between the product and the epilogue.
LARGEST_TILE = TileShape(512, 2048)
TEMPORARIES = 0

_ABI_VERSION = 3
_ID_NAMES = ("top_ids", "released_ids")  # of RowState
_SUM_TYPES = (torch.float32, torch.float64)
_WEIGHT_TYPES = {torch.float32: 0, torch.float64: 1, torch.bfloat16: 2, torch.float16: 3}


# Terms of a sum in one product of the BLAS.  MKL splits longer sums of small results over threads,
# and shorter ones if the second factor is transposed.
_INNER, _INNER_NARROW, _INNER_VECTOR = 256, 128, 16
_WIDE = 2048


# Exponentials of at least this share of their row's total are multiplied in full, smaller ones in
# bfloat16: the error of the sum stays far below that of rounding the sum.
_LARGE_PART = 1 / 64
_LARGE_BYTES = 32 << 20


def operand_dtype(computed: torch.dtype, rounded: torch.dtype, *, is_given: bool) -> torch.dtype:
    """Return bfloat16 if the CPU has instructions for it, or else the dtype of sums.

    Gradients of tensors that autocast rounds are float32, and are computed in float32.
    """
    is_bfloat16 = is_given and rounded == torch.bfloat16
    return rounded if is_bfloat16 and product_set() != "none" else computed


def exponential_dtype(computed: torch.dtype, operand: torch.dtype) -> torch.dtype:
    """Return the dtype of logits, which the exponentials overwrite."""
    return computed


def product(out: Tensor, a: Tensor, b: Tensor, *, adds: bool) -> None:
    """Set ``out`` to ``a @ b``, or add that, in the same order for any number of threads."""
    if b.dtype == torch.bfloat16:
        _narrow_product(out, a, b, adds=adds)
        return
    if out.shape[0] == 1 and out.shape[1] != 1:
        out, a, b = out.T, b.T, a.T
    if out.shape[1] == 1:
        _vector_product(out, a, b, adds=adds)
        return
    is_transposed = b.stride(1) != 1
    size = _INNER_NARROW if is_transposed and out.shape[1] < _WIDE else _INNER
    if not adds:
        torch.mm(a[:, :size], b[:size], out=out)
    for inner in spans(a.shape[1], size):
        if adds or inner.start > 0:
            out.addmm_(a[:, inner], b[inner])


def _vector_product(out: Tensor, a: Tensor, b: Tensor, *, adds: bool) -> None:
    """Multiply by a single column."""
    if not has_library():
        if not adds:
            out.zero_()
        for inner in spans(a.shape[1], _INNER_VECTOR):
            out.add_((a[:, inner] * b[inner].T).sum(dim=1, keepdim=True))
        return
    assert a.dtype == b.dtype == out.dtype in _SUM_TYPES
    _library().realign_vector_product(
        out.dtype == torch.float64, torch.get_num_threads(), adds, *a.shape, a.data_ptr(),
        *a.stride(), b.data_ptr(), b.stride(0), out.data_ptr(), out.stride(0),
    )  # fmt: skip


def exponential_product(
    out: Tensor,
    exponentials: Tensor,
    b: Tensor,
    totals: Tensor,
    *,
    scale: Tensor | None = None,
    adds: bool,
) -> None:
    """Set ``out`` to ``exponentials @ b``, or with a scale to ``(scale * exponentials).T @ b``."""
    limits = totals * _LARGE_PART
    if scale is None:
        _narrow_product(out, exponentials, b, adds=adds, row_limits=limits)
    else:
        _narrow_product(out, exponentials.T, b, adds=adds, scale=scale, term_limits=limits)


def _narrow_product(
    out: Tensor,
    a: Tensor,
    b: Tensor,
    *,
    adds: bool,
    scale: Tensor | None = None,
    row_limits: Tensor | None = None,
    term_limits: Tensor | None = None,
) -> None:
    """Multiply by a bfloat16 matrix."""
    limits = term_limits if row_limits is None else row_limits
    assert b.dtype == torch.bfloat16
    assert a.dtype == torch.float32 or (a.dtype == b.dtype and scale is None and limits is None)
    argument = _Product(
        num_threads=torch.get_num_threads(),
        adds=adds,
        num_rows=out.shape[0],
        num_columns=out.shape[1],
        num_terms=a.shape[1],
        a_type=_WEIGHT_TYPES[a.dtype],
        a=a.data_ptr(),
        a_row_stride=a.stride(0),
        a_term_stride=a.stride(1),
        scale=_vector(scale, torch.float32),
        limits=_vector(limits, torch.float32),
        limits_are_of_rows=row_limits is not None,
        b=b.data_ptr(),
        b_term_stride=b.stride(0),
        b_column_stride=b.stride(1),
        out=_matrix(out, torch.float32),
        out_stride=out.stride(0),
    )
    if not _library().realign_product(byref(argument)):
        raise MemoryError("There is not enough memory for the packed copies of a product.")


class _Product(Structure):
    """``RealignProduct`` of csrc/realign_kernels.h."""

    _fields_: ClassVar = [
        ("num_threads", c_int32),
        ("adds", c_int32),
        ("num_rows", c_int64),
        ("num_columns", c_int64),
        ("num_terms", c_int64),
        ("a_type", c_int32),
        ("a", c_void_p),
        ("a_row_stride", c_int64),
        ("a_term_stride", c_int64),
        ("scale", c_void_p),
        ("limits", c_void_p),
        ("limits_are_of_rows", c_int32),
        ("b", c_void_p),
        ("b_term_stride", c_int64),
        ("b_column_stride", c_int64),
        ("out", c_void_p),
        ("out_stride", c_int64),
    ]


class _Tile(Structure):
    """``RealignTile`` of csrc/realign_kernels.h."""

    _fields_: ClassVar = [
        ("is_double", c_int32),
        ("num_threads", c_int32),
        ("num_rows", c_int64),
        ("num_columns", c_int64),
        ("first_column", c_int64),
        ("logits", c_void_p),
        ("logits_stride", c_int64),
        ("keeps_exponentials", c_int32),
        ("replays", c_int32),
        ("bias", c_void_p),
        ("labels", c_void_p),
        ("logit_scale", c_double),
        ("logit_softcap", c_double),
        ("temperature", c_double),
        ("bound", c_double),
        ("shift", c_void_p),
        ("rest_sum", c_void_p),
        ("tile_shift", c_void_p),
        ("accumulator", c_void_p),
        ("accumulator_columns", c_int64),
        ("accumulator_stride", c_int64),
        ("low_rank_accumulator", c_void_p),
        ("low_rank_columns", c_int64),
        ("low_rank_stride", c_int64),
        ("logit_sum", c_void_p),
        ("label_logits", c_void_p),
        ("rest_entropy_sum", c_void_p),
        ("rest_square_sum", c_void_p),
        ("top_logits", c_void_p),
        ("top_ids", c_void_p),
        ("released_ids", c_void_p),
        ("released_values", c_void_p),
    ]


class _Pairs(Structure):
    """``RealignPairs`` of csrc/realign_kernels.h."""

    _fields_: ClassVar = [
        ("is_double", c_int32),
        ("num_tokens", c_int64),
        ("tokens_per_sequence", c_int64),
        ("token_logps", c_void_p),
        ("labels", c_void_p),
        ("ignore_index", c_int64),
        ("sequence_ids", c_void_p),
        ("num_cells", c_int64),
        ("num_pairs", c_int64),
        ("ref_logps", c_void_p),
        ("terms", c_void_p),
        ("num_terms", c_int64),
        ("nll_weight", c_double),
        ("beta", c_double),
        ("image_beta", c_double),
        ("loss", c_void_p),
        ("logps", c_void_p),
        ("counts", c_void_p),
        ("rewards", c_void_p),
        ("text_margins", c_void_p),
        ("image_margins", c_void_p),
        ("coefficients", c_void_p),
    ]


@functools.cache
def library_path() -> str | None:
    """Return the path of the compiled library, or None if it was not built."""
    spec = importlib.util.find_spec("realign_kernels._csrc")
    return None if spec is None else spec.origin


@functools.cache
def has_library() -> bool:
    """Return whether the compiled library exists and loads; the eager backend does not need it."""
    if library_path() is None:
        return False
    try:
        _library()
    except (OSError, RuntimeError):
        return False
    return True


@functools.cache
def _library() -> ctypes.CDLL:
    path = library_path()
    assert path is not None  # dispatch.py does not choose this backend without one
    return _load(path)


def _load(path: str) -> ctypes.CDLL:
    library = ctypes.CDLL(path)
    library.realign_abi_version.restype = c_int32
    version = library.realign_abi_version()
    if version != _ABI_VERSION:
        raise RuntimeError(
            f"{path} must have version {_ABI_VERSION} of the interface, got {version}. "
            "Install the package again."
        )
    library.realign_instruction_set.restype = c_char_p
    library.realign_product_set.restype = c_char_p
    library.realign_product.argtypes = [POINTER(_Product)]
    library.realign_product.restype = c_int32
    library.realign_use_large_pages.argtypes = [c_void_p, c_int64]
    library.realign_use_large_pages.restype = None
    library.realign_epilogue.argtypes = [POINTER(_Tile)]
    library.realign_pair_loss.argtypes = [POINTER(_Pairs)]
    sizes = (c_int32, c_int32, c_int64, c_int64)  # a dtype, threads, rows and columns
    weight = (c_int32, c_void_p, c_int64, c_int64)
    library.realign_label_dot.argtypes = [
        *sizes, c_void_p, c_int64, *weight, c_int64, c_void_p, c_void_p,
    ]  # fmt: skip
    library.realign_combine.argtypes = [
        *sizes, c_void_p, c_int64, c_void_p, *weight, c_int64, c_void_p, c_void_p,
    ]  # fmt: skip
    library.realign_add_entries.argtypes = [
        *sizes, c_void_p, c_int64, c_void_p, c_void_p, c_void_p, c_void_p, c_int64, c_int64,
    ]  # fmt: skip
    library.realign_vector_product.argtypes = [
        *sizes[:2], c_int32, *sizes[2:], c_void_p, c_int64, c_int64, c_void_p, c_int64, c_void_p,
        c_int64,
    ]  # fmt: skip
    names = ("epilogue", "pair_loss", "label_dot", "combine", "add_entries", "vector_product")
    for name in names:
        getattr(library, f"realign_{name}").restype = None
    return library


def instruction_set() -> str:
    """Return the widest instruction set that the library uses here."""
    return str(_library().realign_instruction_set().decode())


def product_set() -> str:
    """Return how bfloat16 is multiplied: "amx", "avx512", "none" or, in tests, "portable"."""
    return str(_library().realign_product_set().decode())


def _vector(tensor: Tensor | None, dtype: torch.dtype) -> int | None:
    """Return the address of a contiguous vector, or None."""
    if tensor is None:
        return None
    assert tensor.device.type == "cpu"
    assert tensor.dtype == dtype
    assert tensor.is_contiguous()
    return tensor.data_ptr()


def _matrix(tensor: Tensor, *dtypes: torch.dtype) -> int:
    """Return the address of a matrix whose rows are contiguous."""
    assert tensor.device.type == "cpu"
    assert tensor.dtype in dtypes
    assert tensor.shape[1] <= 1 or tensor.stride(1) == 1
    return tensor.data_ptr()


def _sizes(matrix: Tensor) -> tuple[int, int, int]:
    return torch.get_num_threads(), *matrix.shape


def _weight(weight: Tensor) -> tuple[int, int, int, int, int]:
    kind = _WEIGHT_TYPES[weight.dtype]
    return kind, weight.data_ptr(), weight.stride(0), weight.stride(1), weight.shape[0]


def expect_writes(tensor: Tensor) -> None:
    """Ask for large pages for large tensors, whose page faults would cost as much as a product.

    Smaller tensors lie in memory that is reused.
    """
    if tensor.nbytes >= _LARGE_BYTES:
        _library().realign_use_large_pages(tensor.data_ptr(), tensor.nbytes)


def epilogue(tile: Tile) -> None:
    """Fold a tile of logits into the sums of its rows."""
    state, transform = tile.state, tile.transform
    assert tile.exponentials is None or tile.exponentials.data_ptr() == tile.logits.data_ptr()
    dtype = tile.logits.dtype
    argument = _Tile(
        is_double=dtype == torch.float64,
        num_threads=torch.get_num_threads(),
        num_rows=tile.logits.shape[0],
        num_columns=tile.logits.shape[1],
        first_column=tile.first_column,
        logits=_matrix(tile.logits, *_SUM_TYPES),
        logits_stride=tile.logits.stride(0),
        keeps_exponentials=tile.exponentials is not None,
        replays=tile.replays,
        bias=_vector(tile.bias, dtype),
        labels=_vector(tile.labels, torch.int64),
        logit_scale=transform.logit_scale,
        logit_softcap=transform.logit_softcap or 0.0,
        temperature=transform.temperature,
        bound=tile.bound,
        tile_shift=_vector(tile.tile_shift, dtype),
        **{
            name: _vector(value, torch.int64 if name in _ID_NAMES else dtype)
            for name, value in state._asdict().items()
        },
    )
    for name, matrix in (
        ("accumulator", tile.accumulator),
        ("low_rank", tile.low_rank_accumulator),
    ):
        if matrix is not None:
            pointer = "accumulator" if name == "accumulator" else "low_rank_accumulator"
            setattr(argument, pointer, _matrix(matrix, dtype))
            setattr(argument, f"{name}_columns", matrix.shape[1])
            setattr(argument, f"{name}_stride", matrix.stride(0))
    _library().realign_epilogue(byref(argument))


def label_dot(hidden: Tensor, weight: Tensor, ids: Tensor, out: Tensor) -> None:
    """Add ``hidden[n] . weight[ids[n]]`` to ``out[n]`` where the id is a row of the weight."""
    _library().realign_label_dot(
        _hidden_type(hidden, out), *_sizes(hidden), _matrix(hidden, hidden.dtype),
        hidden.stride(0), *_weight(weight), _vector(ids, torch.int64), _vector(out, out.dtype),
    )  # fmt: skip


def _hidden_type(hidden: Tensor, sums: Tensor) -> int:
    """Return the dtype of hidden states as C takes it: that of sums, or bfloat16 for float32."""
    assert sums.dtype in _SUM_TYPES
    is_narrow = (hidden.dtype, sums.dtype) == (torch.bfloat16, torch.float32)
    assert hidden.dtype == sums.dtype or is_narrow
    return _WEIGHT_TYPES[hidden.dtype]


def combine(
    accumulator: Tensor, scale: Tensor, weight: Tensor, ids: Tensor, coefficient: Tensor
) -> None:
    """Set each row to ``scale * row + coefficient * weight[id]``; invalid ids add nothing."""
    dtype = accumulator.dtype
    _library().realign_combine(
        dtype == torch.float64, *_sizes(accumulator), _matrix(accumulator, *_SUM_TYPES),
        accumulator.stride(0), _vector(scale, dtype), *_weight(weight), _vector(ids, torch.int64),
        _vector(coefficient, dtype),
    )  # fmt: skip


def add_entries(
    out: Tensor, starts: Tensor, order: Tensor, coefficient: Tensor, hidden: Tensor
) -> None:
    """Add ``coefficient * hidden`` of the entries ``order[starts[v]:starts[v + 1]]`` to row v."""
    _library().realign_add_entries(
        _hidden_type(hidden, out), *_sizes(out), _matrix(out, out.dtype), out.stride(0),
        _vector(starts, torch.int64), _vector(order, torch.int64), _vector(coefficient, out.dtype),
        _matrix(hidden, hidden.dtype), hidden.stride(0), hidden.shape[0],
    )  # fmt: skip


def pair_loss(batch: PairBatch, results: PairResults) -> None:
    """Fill in the results of a preference batch."""
    assert batch.token_logps.dtype in _SUM_TYPES
    terms = torch.tensor(batch.objective.table(), dtype=torch.float64, device="cpu")
    ref_logps = batch.ref_logps
    if ref_logps is not None:
        ref_logps = ref_logps.to(torch.float64).contiguous()
    wide = {
        name: part if part.dtype == torch.int64 else part.to(torch.float64)
        for name, part in results._asdict().items()
    }
    argument = _Pairs(
        is_double=batch.token_logps.dtype == torch.float64,
        num_tokens=batch.token_logps.numel(),
        tokens_per_sequence=batch.labels.shape[-1],
        token_logps=_vector(batch.token_logps, batch.token_logps.dtype),
        labels=_vector(batch.labels, torch.int64),
        ignore_index=batch.ignore_index,
        sequence_ids=_vector(batch.sequence_ids, torch.int64),
        num_cells=batch.num_cells,
        num_pairs=batch.num_pairs,
        ref_logps=_vector(ref_logps, torch.float64),
        terms=_vector(terms, torch.float64),
        num_terms=len(terms),
        nll_weight=batch.objective.nll_weight,
        beta=batch.objective.beta,
        image_beta=batch.objective.image_beta,
        **{name: _vector(value, value.dtype) for name, value in wide.items()},
    )
    _library().realign_pair_loss(byref(argument))
    for name, part in results._asdict().items():
        if wide[name] is not part:
            part.copy_(wide[name])
