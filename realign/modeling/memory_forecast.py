"""Forecast of the memory that training a model would take, from its configuration alone."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from transformers import AutoModelForImageTextToText

from realign.modeling.adapters import add_adapter
from realign.modeling.memory import Footprint
from realign.modeling.parts import freeze_parts, frozen_parts

# Bytes that a decoder layer keeps for the backward per token and hidden unit, in 16 bits and
# without the attention matrix, which SDPA does not keep: Korthikanti et al. 2022, arXiv 2205.05198,
# eq. 2.
_LAYER_BYTES_16_BIT = 34
_DTYPES = (torch.float32, torch.bfloat16)


def predict_memory(
    config: Any,
    *,
    rank: int,
    alpha: int,
    targets: str | Sequence[str],
    freeze_vision: bool,
    sequences: int,
    longest: int | None,
) -> dict[str, Any]:
    """Return the bytes of each kind of training and dtype, and estimates of the activations.

    Args:
        config: The model's configuration.
        rank: Rank of the LoRA adapter that would train.
        alpha: Numerator of the adapter's scaling.
        targets: The layers that get the adapter.
        freeze_vision: Whether the vision tower is frozen.
        sequences: Number of sequences in a micro-batch.
        longest: Tokens of the longest sequence; None if it is not known.
    """
    training = []
    for dtype in _DTYPES:
        with torch.device("meta"):
            model = AutoModelForImageTextToText.from_config(config, dtype=dtype)
        freeze_parts(model, frozen_parts(vision=freeze_vision, projector=False, language=False))
        training.append(_entry("full", dtype, Footprint.of(model)))
        with torch.device("meta"):
            adapted = add_adapter(
                model,
                rank=rank,
                alpha=alpha,
                targets=targets,
                freeze_vision=freeze_vision,
            )
        training.append(_entry("lora", dtype, Footprint.of(adapted)))
    return {"training": training, "estimates": _estimates(config, sequences, longest)}


def _entry(kind: str, dtype: torch.dtype, footprint: Footprint) -> dict[str, Any]:
    return {
        "kind": kind,
        "dtype": str(dtype).removeprefix("torch."),
        "weights_bytes": footprint.weights,
        "gradients_bytes": footprint.gradients,
        "optimizer_state_bytes": footprint.optimizer_state,
        "total_bytes": footprint.total,
    }


def _estimates(config: Any, sequences: int, longest: int | None) -> list[dict[str, Any]]:
    """Return the activations of a micro-batch of the longest row, and the bytes of generation per
    token.
    """
    shape = decoder_shape(config)
    if shape is None:
        return []
    layers, _, key_units = shape
    estimates = []
    for dtype in _DTYPES:
        plain, checkpointed = (
            None
            if longest is None
            else micro_step_bytes(
                config, dtype, tokens=sequences * longest, is_checkpointed=is_checkpointed
            )
            for is_checkpointed in (False, True)
        )
        estimates.append(
            {
                "dtype": str(dtype).removeprefix("torch."),
                "activations_bytes": plain,
                "activations_with_checkpointing_bytes": checkpointed,
                "generation_cache_bytes_a_token": 2 * layers * key_units * dtype.itemsize,
            }
        )
    return estimates


def micro_step_bytes(
    config: Any, dtype: torch.dtype, *, tokens: int, is_checkpointed: bool
) -> int | None:
    """Estimate the bytes that a micro-batch keeps for its backward pass; None if the configuration
    does not state the decoder's shape.

    Args:
        config: The model's configuration.
        dtype: Dtype of the layers' activations.
        tokens: Tokens of all sequences of the micro-batch, as if no prefix were shared.
        is_checkpointed: Whether the layers are recomputed in the backward pass.
    """
    shape = decoder_shape(config)
    if shape is None:
        return None
    layers, hidden, _ = shape
    per_layer = hidden * _LAYER_BYTES_16_BIT * dtype.itemsize // 2
    if is_checkpointed:
        # the input of every layer, and all activations of the layer that is being recomputed
        return tokens * (layers * hidden * dtype.itemsize + per_layer)
    return tokens * layers * per_layer


def decoder_shape(config: Any) -> tuple[int, int, int] | None:
    """Return the number of layers, the hidden size, and the size of a token's keys in a layer."""
    text = config.get_text_config()
    layers = getattr(text, "num_hidden_layers", None)
    hidden = getattr(text, "hidden_size", None)
    heads = getattr(text, "num_attention_heads", None)
    if not layers or not hidden or not heads:
        return None
    # some configurations have these fields, but set to None
    key_value_heads = getattr(text, "num_key_value_heads", None) or heads
    head_dim = getattr(text, "head_dim", None) or hidden // heads
    return layers, hidden, key_value_heads * head_dim
