"""What lies between a hidden state and its logits: options, transform, and the head in tiles.

Knows nothing of labels or probabilities.  Letters: **N** answer tokens, **D** hidden size, **V**
vocabulary, **r** rank.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
import torch.distributed as dist
from torch import Tensor

from realign_kernels.dispatch import MEMORY_MODES, check_backend

LoraFactors = tuple[Tensor, Tensor, float]


@dataclass(frozen=True, kw_only=True, slots=True)
class HeadOptions:
    """The keyword arguments that every function of a head shares; numbers and names are checked."""

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
    group: dist.ProcessGroup | None

    def __post_init__(self) -> None:
        for name in ("logit_scale", "temperature", "logit_softcap"):
            value = getattr(self, name)
            if value is not None and not (math.isfinite(value) and value > 0):
                raise ValueError(f"{name} must be finite and > 0, got {value}.")
        if self.lm_head_lora is not None and len(self.lm_head_lora) != 3:
            raise ValueError(
                f"lm_head_lora must be (A, B, scaling), got {len(self.lm_head_lora)} values."
            )
        if self.lm_head_lora is not None:
            scaling = self.lm_head_lora[2]
            if not isinstance(scaling, int | float):
                raise TypeError(
                    f"lm_head_lora must have a number as scaling, got {type(scaling).__name__}. "
                    "It gets no gradient."
                )
            if not math.isfinite(scaling):
                raise ValueError(f"lm_head_lora must have a finite scaling, got {scaling}.")
        for name in ("workspace_bytes", "stash_bytes"):
            if getattr(self, name) < 0:
                raise ValueError(f"{name} must be >= 0, got {getattr(self, name)}.")
        if self.memory not in MEMORY_MODES:
            raise ValueError(f"memory must be one of {list(MEMORY_MODES)}, got {self.memory!r}.")
        check_backend(self.backend)
        if self.group is not None and not (dist.is_available() and dist.is_initialized()):
            raise RuntimeError(
                "group must belong to an initialised torch.distributed, got one without it. "
                "Call torch.distributed.init_process_group first, or pass group=None."
            )

    @property
    def transform(self) -> LogitTransform:
        """The elementwise part of the head."""
        return LogitTransform(self.logit_scale, self.logit_softcap, self.temperature)


@dataclass(frozen=True, slots=True)
class LogitTransform:
    """``x = T(z)``: scale, softcap ``c * tanh(z / c)``, then divide by the temperature."""

    logit_scale: float
    logit_softcap: float | None
    temperature: float

    def apply_(self, logits: Tensor) -> Tensor:
        """Turn raw logits z into x, in place."""
        if self.logit_softcap is None:
            return self._scale_(logits)
        cap = self.logit_softcap
        return logits.mul_(self.logit_scale / cap).tanh_().mul_(cap / self.temperature)

    def chain_(self, grad: Tensor, x: Tensor) -> Tensor:
        """Turn the gradient by x into the gradient by z, in place; overwrites x too."""
        if self.logit_softcap is not None:
            # tanh(z * scale / c) is x * temperature / c, so that the raw logits need not be kept.
            grad.mul_(x.mul_(self.temperature / self.logit_softcap).square_().neg_().add_(1))
        return self._scale_(grad)

    def slope(self, x: Tensor) -> Tensor:
        """Return ``dx/dz`` as a function of x."""
        slope = torch.full_like(x, self.logit_scale / self.temperature)
        if self.logit_softcap is not None:
            slope = slope * (1 - (x * (self.temperature / self.logit_softcap)).square())
        return slope

    def _scale_(self, tile: Tensor) -> Tensor:
        slope = self.logit_scale / self.temperature
        return tile if slope == 1.0 else tile.mul_(slope)


@dataclass(frozen=True, slots=True)
class Precision:
    """The dtype that autocast rounds operands to, if it is on, and the dtypes computed in."""

    autocast: torch.dtype | None
    accumulation: torch.dtype
    operand: torch.dtype  # of hidden states and weight in products; results are never rounded to it

    def rounded(self, tensor: Tensor) -> Tensor:
        """Round as autocast asks."""
        return tensor if self.autocast is None else tensor.to(self.autocast)

    def of_operand(self, tensor: Tensor) -> Tensor:
        """Round as autocast asks and cast to what products take."""
        return self.rounded(tensor).to(self.operand)

    def copies(self, dtype: torch.dtype) -> bool:
        """Tell whether :meth:`of_operand` makes a copy."""
        return dtype != self.operand or self.autocast not in (None, dtype)

    def of_factor(self, tensor: Tensor) -> Tensor:
        """The same for low-rank factors, whose products are small and never in half precision."""
        return self.rounded(tensor).to(self.accumulation)


@dataclass(frozen=True, slots=True)
class HeadTile:
    """A range of vocabulary rows of the head, as products take them."""

    columns: slice
    weight: Tensor  # (columns, D)
    bias: Tensor | None  # (columns,)
    lora_b: Tensor | None  # (columns, r), times the scaling

    def logits(self, hidden: Tensor, low_rank: Tensor | None) -> Tensor:
        """Return raw logits z, (rows, columns)."""
        logits = hidden @ self.weight.T
        if self.bias is not None:
            logits.add_(self.bias)
        if self.lora_b is not None and low_rank is not None:
            logits.addmm_(low_rank, self.lora_b.T)
        return logits


@dataclass(frozen=True, slots=True)
class Head:
    """The output projection as given; copied one tile at a time, but for the (r, D) factor A."""

    weight: Tensor  # (V, D)
    bias: Tensor | None  # (V,)
    lora_a: Tensor | None  # (r, D), in the accumulation dtype
    lora_b: Tensor | None  # (V, r)
    lora_scaling: float
    precision: Precision

    def tile(self, columns: slice) -> HeadTile:
        """Cast a range of the vocabulary."""
        return HeadTile(
            columns,
            weight=self.precision.of_operand(self.weight[columns]),
            bias=None if self.bias is None else self.bias[columns].to(self.precision.accumulation),
            lora_b=None
            if self.lora_b is None
            else self.precision.of_factor(self.lora_b[columns]).mul(self.lora_scaling),
        )

    def low_rank(self, hidden: Tensor) -> Tensor | None:
        """Return ``hidden @ A.T``, (rows, r)."""
        return None if self.lora_a is None else hidden.to(self.lora_a.dtype) @ self.lora_a.T
