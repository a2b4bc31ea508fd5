"""From a hidden state to its logits: the transform, the dtypes, and the head in tiles.

This module knows nothing of labels or probabilities. Letters: **N** answer tokens, **D** hidden
size, **V** vocabulary, **r** rank.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor


@dataclass(frozen=True, slots=True)
class LogitTransform:
    """``x = T(z)``: scale, softcap ``c * tanh(z / c)``, then divide by the temperature."""

    logit_scale: float
    logit_softcap: float | None
    temperature: float

    def apply_(self, logits: Tensor) -> Tensor:
        """Turn raw logits z into x, in place."""
        if self.logit_softcap is None:
            slope = self.logit_scale / self.temperature
            return logits if slope == 1.0 else logits.mul_(slope)
        cap = self.logit_softcap
        return logits.mul_(self.logit_scale / cap).tanh_().mul_(cap / self.temperature)

    def slope(self, x: Tensor) -> Tensor:
        """Return ``dx/dz`` as a function of x."""
        linear = self.logit_scale / self.temperature
        if self.logit_softcap is None:
            return torch.full_like(x, linear)
        # tanh(z * scale / c) is x * temperature / c, so that the raw logits need not be kept.
        tanh = x * (self.temperature / self.logit_softcap)
        return tanh.square_().neg_().add_(1).mul_(linear)


@dataclass(frozen=True, slots=True)
class Precision:
    """The dtype that operands are rounded to, if any, and the dtypes of the computation."""

    autocast: torch.dtype | None  # or the hidden states' dtype, where the weight has another
    accumulation: torch.dtype
    operand: torch.dtype  # of hidden states and weight in products; results are never rounded to it
    exponential: torch.dtype  # of exponentials in products
    rounds_factors: bool = True  # whether low-rank factors are rounded too

    def rounded(self, tensor: Tensor) -> Tensor:
        """Round to autocast's dtype, or to that of the hidden states where the weight's differs."""
        return tensor if self.autocast is None else tensor.to(self.autocast)

    def of_operand(self, tensor: Tensor) -> Tensor:
        """Round like :meth:`rounded`, and cast to the dtype of products."""
        return self.rounded(tensor).to(self.operand)

    def copies(self, dtype: torch.dtype) -> bool:
        """Return whether :meth:`of_operand` makes a copy."""
        return dtype != self.operand or self.autocast not in (None, dtype)

    @property
    def splits_factors(self) -> bool:
        """Return whether low-rank factors are multiplied as a sum of parts in bfloat16.

        Where exponentials are bfloat16, a float32 factor would need a float32 copy of every tile.
        """
        return self.operand == self.exponential == torch.bfloat16

    def of_factor(self, tensor: Tensor) -> Tensor:
        """Cast a low-rank factor, whose products are small and never in half precision."""
        rounded = self.rounded(tensor) if self.rounds_factors else tensor
        return rounded.to(self.accumulation)


def split(factor: Tensor, num_parts: int) -> list[Tensor]:
    """Return parts in bfloat16, each 2^-8 of the one before, whose sum is nearly the factor."""
    parts = []
    for _ in range(num_parts):
        parts.append(factor.to(torch.bfloat16))
        factor = factor - parts[-1]
    return parts


# With three parts of either factor: the pairs of parts whose product is large enough to matter.
PARTS_OF_ROWS, PARTS_OF_FACTOR = (0, 0, 1, 1, 0, 2), (0, 1, 0, 1, 2, 0)


@dataclass(frozen=True, slots=True)
class HeadTile:
    """A range of vocabulary rows of the head, in the dtype of products."""

    weight: Tensor  # (columns, D)
    bias: Tensor | None  # (columns,)
    lora_b: Tensor | None  # (columns, r), times the scaling
    lora_b_parts: Tensor | None = None  # (columns, 6r): PARTS_OF_FACTOR, side by side


@dataclass(frozen=True, slots=True)
class Head:
    """The output projection as given; all but the (r, D) factor A is cast one tile at a time."""

    weight: Tensor  # (V, D)
    bias: Tensor | None  # (V,)
    lora_a: Tensor | None  # (r, D), in the accumulation dtype
    lora_b: Tensor | None  # (V, r)
    lora_scaling: float
    precision: Precision

    def tile(self, columns: slice) -> HeadTile:
        """Return a range of the vocabulary in the dtypes of products."""
        precision = self.precision
        bias = lora_b = None
        if self.bias is not None:
            bias = self.bias[columns].to(precision.accumulation).contiguous()
        if self.lora_b is not None:
            lora_b = precision.of_factor(self.lora_b[columns]).mul(self.lora_scaling)
        lora_b_parts = None
        if lora_b is not None and precision.splits_factors:
            parts = split(lora_b, 3)
            lora_b_parts = torch.cat([parts[i] for i in PARTS_OF_FACTOR], dim=1)
        return HeadTile(precision.of_operand(self.weight[columns]), bias, lora_b, lora_b_parts)
