"""Memory of training: weights, gradients and optimizer state, and an estimate of activations."""

from __future__ import annotations

from collections.abc import Collection
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn

# AdamW keeps two moments a trained weight, in its dtype
OPTIMIZER_COPIES = 2
# bits of a 4-bit weight with its doubly quantised scale: QLoRA, arXiv 2305.14314, section 3
NF4_BITS = 4.127
# Bytes that a decoder layer keeps for the backward, a token and hidden unit, in 16 bits and without
# the attention matrix, which SDPA does not keep: Korthikanti et al. 2022, arXiv 2205.05198, eq. 2.
_LAYER_BYTES_16_BIT = 34


@dataclass(frozen=True)
class Footprint:
    """Bytes before any activation."""

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
        """Sum of the three."""
        return self.weights + self.gradients + self.optimizer_state

    def __str__(self) -> str:
        return (
            f"weights {size(self.weights)} + gradients {size(self.gradients)} + optimizer state "
            f"{size(self.optimizer_state)} = about {size(self.total)} before activations"
        )


def footprint(model: nn.Module, quantized: Collection[str] = ()) -> str:
    """Return one line: trained and all parameters, full or LoRA, dtypes, estimated bytes."""
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
    """Return bytes as people read them."""
    units = ((1e9, "GB"), (1e6, "MB"), (1e3, "kB"))
    unit, name = next((pair for pair in units if num_bytes >= pair[0]), units[-1])
    return f"{num_bytes / unit:.1f} {name}"


def micro_step_bytes(
    config: Any, dtype: torch.dtype, *, tokens: int, is_checkpointed: bool
) -> int | None:
    """Estimate of what a micro-step keeps for its backward; None where the configuration does not
    say enough.

    Args:
        config: The model's configuration.
        dtype: That the layers compute in.
        tokens: Of all sequences of the micro-step, as if nothing were shared.
        is_checkpointed: Whether the layers are computed again for the backward.
    """
    shape = decoder_shape(config)
    if shape is None:
        return None
    layers, hidden, _ = shape
    per_layer = hidden * _LAYER_BYTES_16_BIT * dtype.itemsize // 2
    if is_checkpointed:
        # the input of every layer, and all of the one that is computed again
        return tokens * (layers * hidden * dtype.itemsize + per_layer)
    return tokens * layers * per_layer


def decoder_shape(config: Any) -> tuple[int, int, int] | None:
    """Layers, hidden units, and units of the keys (or values) of a token in one layer."""
    text = config.get_text_config()
    layers = getattr(text, "num_hidden_layers", None)
    hidden = getattr(text, "hidden_size", None)
    heads = getattr(text, "num_attention_heads", None)
    if not layers or not hidden or not heads:
        return None
    # some configurations have the keys and no values
    key_value_heads = getattr(text, "num_key_value_heads", None) or heads
    head_dim = getattr(text, "head_dim", None) or hidden // heads
    return layers, hidden, key_value_heads * head_dim
