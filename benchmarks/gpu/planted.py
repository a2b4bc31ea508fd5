"""A kernel that writes past the end of its tensor, for :mod:`benchmarks.gpu.sanitizer` to find."""

from __future__ import annotations

import torch
import triton
import triton.language as tl


@triton.jit
def _planted_kernel(out_ptr, BLOCK: tl.constexpr):
    offsets = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    tl.store(out_ptr + offsets, offsets.to(tl.float32))


def main() -> None:
    """Write 4096 numbers to a tensor of 64."""
    out = torch.zeros(64, device="cuda")
    _planted_kernel[(32,)](out, BLOCK=128)
    torch.cuda.synchronize()


if __name__ == "__main__":
    main()
