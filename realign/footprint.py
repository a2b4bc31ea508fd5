"""How much of a model trains and the memory that this takes before any activation."""

from __future__ import annotations

from torch import nn

# AdamW keeps two moments a trained weight, in its dtype
OPTIMIZER_COPIES = 2


def footprint(model: nn.Module) -> str:
    """Return one line: trained and all parameters, full or LoRA, dtypes, estimated bytes."""
    weights = sum(p.numel() * p.element_size() for p in model.parameters())
    trained = [p for p in model.parameters() if p.requires_grad]
    gradients = sum(p.numel() * p.element_size() for p in trained)
    total = weights + gradients * (1 + OPTIMIZER_COPIES)
    dtypes = {str(p.dtype).removeprefix("torch."): None for p in trained}
    kind = "LoRA" if hasattr(model, "peft_config") else "full fine-tuning"
    return (
        f"{kind}: {sum(p.numel() for p in trained):,} of "
        f"{sum(p.numel() for p in model.parameters()):,} parameters train in {', '.join(dtypes)}; "
        f"weights {_size(weights)} + gradients {_size(gradients)} + optimizer state "
        f"{_size(OPTIMIZER_COPIES * gradients)} = about {_size(total)} before activations"
    )


def _size(num_bytes: int) -> str:
    unit, name = (1e9, "GB") if num_bytes >= 1e9 else (1e6, "MB")
    return f"{num_bytes / unit:.1f} {name}"
