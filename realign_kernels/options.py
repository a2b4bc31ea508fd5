"""Options of a head: the keyword arguments that all functions of this package's head share."""

from __future__ import annotations

from dataclasses import dataclass

import torch.distributed as dist
from torch import Tensor

MEMORY_MODES = ("auto", "stash", "tile", "recompute")
ACCUMULATE_MODES = ("auto", "exact")
# Stands for ignore_index=None.  No label is equal to it: it is refused as a token id.
NO_INDEX = -(2**63)
LoraFactors = tuple[Tensor, Tensor, float]


@dataclass(frozen=True, kw_only=True, slots=True)
class HeadOptions:
    """Options of one call; ``validation.check_options`` refuses values that no head can have."""

    lm_head_bias: Tensor | None
    lm_head_lora: LoraFactors | None
    ignore_index: int
    logit_scale: float
    logit_softcap: float | None
    temperature: float
    backend: str
    memory: str
    workspace_bytes: int
    stash_bytes: int
    accumulate: str
    group: dist.ProcessGroup | None
