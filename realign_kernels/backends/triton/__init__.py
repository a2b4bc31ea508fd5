"""The Triton kernels, for CUDA, ROCm and XPU; in Triton's interpreter they run on CPU tensors.

Know no autograd and no errors of users.  Imported at the first call that needs them.
"""

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

__all__ = [
    "LARGEST_TILE",
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
