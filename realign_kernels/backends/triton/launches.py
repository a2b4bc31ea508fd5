"""Launch settings of every kernel: a table and a pure choice from it.

NOTHING HERE HAS BEEN MEASURED ON A GPU. The numbers follow from the arithmetic of registers and
memory transactions, for an NVIDIA GPU with 64 K registers per multiprocessor.
"""

from __future__ import annotations

import functools
from typing import NamedTuple

import torch
from torch import Tensor

Capability = tuple[int, int]

_WARP_THREADS = 64  # on AMD GPUs; 32 on NVIDIA's


class Launch(NamedTuple):
    """Elements that a program handles at a time, and its warps."""

    block: int
    num_warps: int


# By the least capability that an entry is for, then by kernel and bytes of the computing dtype.
# One entry serves all GPUs until there are measurements to tell them apart.
_LAUNCHES: dict[Capability, dict[tuple[str, int], Launch]] = {
    (0, 0): {
        # A row of an 8192-wide tile in 8 blocks; 8 elements per thread are two 16-byte loads in
        # flight, and with every statistic 4 vectors of them take 32 registers. Not measured.
        ("epilogue", 4): Launch(1024, 4),
        # As many registers per thread as in float32. Not measured.
        ("epilogue", 8): Launch(512, 4),
        # Hidden size 4096 in 4 blocks; a row of the weight is read once, in half precision 16 bytes
        # per thread. Not measured.
        ("label_dot", 4): Launch(1024, 4),
        ("label_dot", 8): Launch(512, 4),  # as many bytes; not measured
        # The same row, read and written; most programs return before either.  Not measured.
        ("combine", 4): Launch(1024, 4),
        ("combine", 8): Launch(512, 4),  # as many bytes; not measured
        # One warp: most rows of the vocabulary have no entry, and the others few. A block of 256 by
        # 8 entries is 64 registers per thread. Not measured.
        ("add_entries", 4): Launch(256, 1),
        ("add_entries", 8): Launch(128, 1),  # as many registers; not measured
        # Tokens of one answer, summed in float64: some hundred in one or two blocks.  Not measured.
        ("sum_sequences", 4): Launch(256, 4),
        ("sum_sequences", 8): Launch(256, 4),  # the sums are the same; not measured
        # The blocks of one row of a tile: 64 of 128 columns.  Not measured.
        ("settle", 4): Launch(256, 1),
        # 32 pairs of four cells in float64, one cell per thread: an objective of four terms takes
        # 128 registers, of which the one program spills a few bytes. Not measured.
        ("pair_loss", 8): Launch(256, 4),
        # All labels of a micro-batch in one or two blocks, 16 per thread. Not measured.
        ("find_rows", 4): Launch(4096, 8),
        ("find_rows", 8): Launch(4096, 8),  # the same labels; not measured
    }
}


class ProductLaunch(NamedTuple):
    """A block of a product that one program computes, and how it is run."""

    rows: int
    columns: int
    depth: int  # of the hidden size, loaded at a time
    num_warps: int
    num_stages: int


# By bytes of the operands. 128 x 128 float32 sums are 64 registers per thread of 8 warps, twice
# that with the partial sums beside them. With the addresses of low-rank factors as well, half as
# many columns spill no register. Not measured.
_PRODUCT_LAUNCHES = {2: ProductLaunch(128, 128, 64, 8, 3), 4: ProductLaunch(64, 64, 32, 4, 3)}
_LOW_RANK_LAUNCHES = {2: ProductLaunch(128, 64, 64, 8, 3), 4: ProductLaunch(64, 32, 32, 4, 3)}

# Dtypes of operands whose product has the epilogue inside, by the least capability that an entry is
# for.  There are none until a GPU has been measured.
_FUSED_PRODUCTS: dict[Capability, frozenset[torch.dtype]] = {(0, 0): frozenset()}

# Terms that a tensor core sums before the sum is added in float32.
PARTIAL_SUM = 1024

# Blocks of rows that programs compute together, so that their columns come from the cache.
BLOCKS_AT_A_TIME = 8

# Entries that a program of add_entries gathers at a time: more hide latency but need registers.
ENTRIES_AT_A_TIME = 8


@functools.lru_cache(maxsize=1024)
def choose_launch(kernel: str, dtype: torch.dtype, width: int, capability: Capability) -> Launch:
    """Return the launch of the newest entry that the capability allows, no wider than needed.

    A block has at least one element per thread: with fewer, Triton gives an element to several
    threads, one of which might store it before another has loaded it.
    """
    newest = max(least for least in _LAUNCHES if least <= capability)
    block, num_warps = _LAUNCHES[newest][kernel, dtype.itemsize]
    needed = 1 << max(0, width - 1).bit_length()
    while num_warps > 1 and num_warps * _WARP_THREADS > needed:
        num_warps //= 2
    return Launch(max(num_warps * _WARP_THREADS, min(block, needed)), num_warps)


def launch_of(kernel: str, dtype: torch.dtype, width: int, device: torch.device) -> Launch:
    """Return how to launch a kernel over ``width`` elements per row on a device."""
    return choose_launch(kernel, dtype, width, _capability(device))


def fuses_product(operand: torch.dtype, device: torch.device) -> bool:
    """Return whether measurements favour a product with the epilogue inside."""
    capability = _capability(device)
    return (
        operand in _FUSED_PRODUCTS[max(least for least in _FUSED_PRODUCTS if least <= capability)]
    )


def _capability(device: torch.device) -> Capability:
    return torch.cuda.get_device_capability(device) if device.type == "cuda" else (0, 0)


def product_launch(
    dtype: torch.dtype, device: torch.device, *, has_low_rank: bool
) -> ProductLaunch:
    """Return how to launch the product of operands of a dtype, with or without low-rank factors."""
    return (_LOW_RANK_LAUNCHES if has_low_rank else _PRODUCT_LAUNCHES)[dtype.itemsize]


def has_dense_rows(matrix: Tensor) -> bool:
    """Return whether the numbers of each row are contiguous, as the kernels assume."""
    return matrix.shape[1] <= 1 or matrix.stride(1) == 1
