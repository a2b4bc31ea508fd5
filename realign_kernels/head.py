"""What lies between a hidden state and its logits: options, transform, and the head in tiles.

Knows nothing of labels or probabilities.  Letters: **N** answer tokens, **D** hidden size, **V**
vocabulary, **r** rank.
"""

from __future__ import annotations

from dataclasses import dataclass

from torch import Tensor

from realign_kernels.options import Precision


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
