"""Weights sharded over data-parallel ranks (FSDP2), which are gathered before a call."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from realign_kernels.options import LoraFactors


def gather_head(
    weight: Tensor, bias: Tensor | None, lora: LoraFactors | None
) -> tuple[Tensor, Tensor | None, LoraFactors | None]:
    """Return the parts of a head, gathered from their shards."""
    if isinstance(lora, tuple | list) and len(lora) == 3:  # anything else is refused later
        lora = (_gather(lora[0]), _gather(lora[1]), lora[2])
    return _gather(weight), _gather(bias), lora


def _gather(tensor: Tensor | None) -> Any:
    """Return the whole value of a DTensor, and anything else as it is.

    Every rank has its own rows, so the gradient is reduced to the shards as FSDP reduces that of
    any other parameter: as the mean over ranks.
    """
    from torch.distributed.tensor import DTensor, Partial

    if not isinstance(tensor, DTensor):
        return tensor
    mesh = tensor.device_mesh
    whole = tensor.full_tensor(grad_placements=[Partial()] * mesh.ndim)
    apply: Any = _MeanOverRanks.apply
    return apply(whole, mesh.size())


class _MeanOverRanks(torch.autograd.Function):
    """The identity, whose gradient is divided by the number of ranks that are summed over."""

    @staticmethod
    def forward(ctx: Any, tensor: Tensor, num_ranks: int) -> Tensor:
        ctx.num_ranks = num_ranks
        return tensor.view_as(tensor)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None]:
        return grad / ctx.num_ranks, None
