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
    """Return bytes by kind of training and dtype, and estimates of the memory on top.

    Args:
        config: The model's configuration.
        rank: Rank of the LoRA adapter that would train.
        alpha: Numerator of its scaling.
        targets: The layers that it adapts.
        freeze_vision: Whether the vision tower trains.
        sequences: Number of sequences in a micro-step.
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
    """Return the memory of a micro-step of the longest row, and that of generation per token."""
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
    """Estimate the bytes that a micro-step keeps for its backward; None for unknown configurations.

    Args:
        config: The model's configuration.
        dtype: Dtype of the layers' activations.
        tokens: Tokens of all sequences of the micro-step, as if nothing were shared.
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
    """Return the layers, hidden units, and units of a token's keys (or values) in one layer."""
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
