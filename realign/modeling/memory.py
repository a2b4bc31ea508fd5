"""Memory of training before any activation: weights, gradients and optimizer state."""

from __future__ import annotations

from collections.abc import Collection
from dataclasses import dataclass

from torch import nn

# AdamW keeps two moments of every trained weight, in the weight's dtype
OPTIMIZER_COPIES = 2
# bits of a 4-bit weight with its doubly quantized scale: QLoRA, arXiv 2305.14314, section 3
NF4_BITS = 4.127


@dataclass(frozen=True)
class Footprint:
    """Bytes of training, without activations."""

    weights: int
    gradients: int
    optimizer_state: int

    @classmethod
    def of(cls, model: nn.Module, quantized: Collection[str] = ()) -> Footprint:
        """Return the footprint of a model, which may be on the meta device.

        Args:
            model: The model.
            quantized: Names of parameters that will be held in 4 bits.
        """
        weights = sum(
            round(p.numel() * NF4_BITS / 8) if name in quantized else p.numel() * p.element_size()
            for name, p in model.named_parameters()
        )
        gradients = sum(p.numel() * p.element_size() for p in model.parameters() if p.requires_grad)
        return cls(weights, gradients, OPTIMIZER_COPIES * gradients)

    @property
    def total(self) -> int:
        """Sum of weights, gradients and optimizer state."""
        return self.weights + self.gradients + self.optimizer_state

    def __str__(self) -> str:
        return (
            f"weights {size(self.weights)} + gradients {size(self.gradients)} + optimizer state "
            f"{size(self.optimizer_state)} = about {size(self.total)} before activations"
        )


def footprint(model: nn.Module, quantized: Collection[str] = ()) -> str:
    """Return a line on the kind of training, the trained parameters, their dtypes and memory."""
    trained = [p for p in model.parameters() if p.requires_grad]
    dtypes = {str(p.dtype).removeprefix("torch."): None for p in trained}
    kind = "LoRA" if hasattr(model, "peft_config") else "full fine-tuning"
    kind += " over 4-bit weights" if quantized else ""
    return (
        f"{kind}: {sum(p.numel() for p in trained):,} of "
        f"{sum(p.numel() for p in model.parameters()):,} parameters train in {', '.join(dtypes)}; "
        f"{Footprint.of(model, quantized)}"
    )


def size(num_bytes: int) -> str:
    """Return a number of bytes as text, such as ``1.5 GB``."""
    units = ((1e9, "GB"), (1e6, "MB"), (1e3, "kB"))
    unit, name = next((pair for pair in units if num_bytes >= pair[0]), units[-1])
    return f"{num_bytes / unit:.1f} {name}"
