"""Options of a head, checked once: numbers, names and dtypes."""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
import torch.distributed as dist
from torch import Tensor

BACKENDS = ("auto", "eager", "triton", "cpu")
MEMORY_MODES = ("auto", "stash", "tile", "recompute")
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
        if self.backend not in BACKENDS:
            raise ValueError(f"backend must be one of {list(BACKENDS)}, got {self.backend!r}.")
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
