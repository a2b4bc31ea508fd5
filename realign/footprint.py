"""How much of a model trains and the memory that this takes before any activation."""

from __future__ import annotations

from dataclasses import dataclass

from torch import nn

# AdamW keeps two moments a trained weight, in its dtype
OPTIMIZER_COPIES = 2


@dataclass(frozen=True)
class Footprint:
    """Bytes before any activation."""

    weights: int
    gradients: int
    optimizer_state: int

    @classmethod
    def of(cls, model: nn.Module) -> Footprint:
        """Of a model whose parameters say whether they train; it may be on the meta device."""
        weights = sum(p.numel() * p.element_size() for p in model.parameters())
        gradients = sum(p.numel() * p.element_size() for p in model.parameters() if p.requires_grad)
        return cls(weights, gradients, OPTIMIZER_COPIES * gradients)

    @property
    def total(self) -> int:
        """All of it."""
        return self.weights + self.gradients + self.optimizer_state

    def __str__(self) -> str:
        return (
            f"weights {size(self.weights)} + gradients {size(self.gradients)} + optimizer state "
            f"{size(self.optimizer_state)} = about {size(self.total)} before activations"
        )


def footprint(model: nn.Module) -> str:
    """Return one line: trained and all parameters, full or LoRA, dtypes, estimated bytes."""
    trained = [p for p in model.parameters() if p.requires_grad]
    dtypes = {str(p.dtype).removeprefix("torch."): None for p in trained}
    kind = "LoRA" if hasattr(model, "peft_config") else "full fine-tuning"
    return (
        f"{kind}: {sum(p.numel() for p in trained):,} of "
        f"{sum(p.numel() for p in model.parameters()):,} parameters train in {', '.join(dtypes)}; "
        f"{Footprint.of(model)}"
    )


def size(num_bytes: int) -> str:
    """Bytes as people read them."""
    units = ((1e9, "GB"), (1e6, "MB"), (1e3, "kB"))
    unit, name = next((pair for pair in units if num_bytes >= pair[0]), units[-1])
    return f"{num_bytes / unit:.1f} {name}"
