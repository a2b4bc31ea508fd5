"""The Triton kernels, for CUDA, ROCm and XPU; in Triton's interpreter they run on CPU tensors.

They do not use autograd, their callers have checked all arguments, and they are imported at the
first call that needs them.
"""

from realign_kernels.backends.triton import fused_product, once
from realign_kernels.backends.triton.epilogue import epilogue
from realign_kernels.backends.triton.pairs import pair_loss
from realign_kernels.backends.triton.products import (
    LARGEST_TILE,
    STRIDE_MULTIPLE,
    TEMPORARIES,
    expect_writes,
    exponential_dtype,
    operand_dtype,
    product,
)
from realign_kernels.backends.triton.rows import add_entries, combine, label_dot

# One kernel each, since a launch costs more than the work.
ROW_KERNELS = once
PRODUCT_KERNELS = fused_product
FITS_TILES = True

__all__ = [
    "FITS_TILES",
    "LARGEST_TILE",
    "PRODUCT_KERNELS",
    "ROW_KERNELS",
    "STRIDE_MULTIPLE",
    "TEMPORARIES",
    "add_entries",
    "combine",
    "epilogue",
    "expect_writes",
    "exponential_dtype",
    "label_dot",
    "operand_dtype",
    "pair_loss",
    "product",
]
