"""The part of the vocabulary that this process holds, and reductions over its group.

Without a group the one shard is the whole vocabulary and every reduction is the identity.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
import torch.distributed as dist
from torch import Tensor


@dataclass(frozen=True, slots=True)
class VocabularyShard:
    """A contiguous range of token ids; with a group, ``start`` and ``total`` are device tensors."""

    size: int
    start: Tensor | int
    total: Tensor | int
    group: dist.ProcessGroup | None

    def all_reduce_sum_(self, tensor: Tensor) -> Tensor:
        """Sum over the group, in place."""
        return self._all_reduce_(tensor, dist.ReduceOp.SUM)

    def all_reduce_max_(self, tensor: Tensor) -> Tensor:
        """Take the maximum over the group, in place."""
        return self._all_reduce_(tensor, dist.ReduceOp.MAX)

    def all_reduce_min_(self, tensor: Tensor) -> Tensor:
        """Take the minimum over the group, in place."""
        return self._all_reduce_(tensor, dist.ReduceOp.MIN)

    def _all_reduce_(self, tensor: Tensor, operation: dist.ReduceOp.RedOpType) -> Tensor:
        if self.group is not None:
            dist.all_reduce(tensor, op=operation, group=self.group)
        return tensor


def locate_shard(size: int, group_name: str, device: torch.device) -> VocabularyShard:
    """Return this rank's shard; sizes may differ between ranks.  The host does not wait for a GPU.

    Torch operators take the name of a group in place of the group; it is resolved as torch's
    functional collectives resolve it.
    """
    group = dist.distributed_c10d._resolve_process_group(group_name)  # type: ignore[attr-defined, arg-type]
    own_size = torch.full((1,), size, dtype=torch.int64, device=device)
    sizes = [torch.empty_like(own_size) for _ in range(dist.get_world_size(group))]
    dist.all_gather(sizes, own_size, group=group)
    stops = torch.cat(sizes).cumsum(0)
    start = stops[dist.get_rank(group)] - size
    return VocabularyShard(size, start=start, total=stops[-1], group=group)
