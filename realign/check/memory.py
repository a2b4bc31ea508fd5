"""How much memory training a model will take, from its configuration alone.

Weights, gradients and optimizer state are counted on the real modules without storage (torch's meta
device). Activations and the generation cache are estimates from the shape of a plain decoder.
"""

from __future__ import annotations

from typing import Any

import torch
from transformers import AutoModelForImageTextToText

from realign.config import LoraSection
from realign.footprint import Footprint
from realign.lora import add_adapter
from realign.modeling import vision_module

_DTYPES = (torch.float32, torch.bfloat16)
# Bytes that a decoder layer keeps for the backward, a token and hidden unit, in 16 bits and without
# the attention matrix, which SDPA does not keep: Korthikanti et al. 2022, arXiv 2205.05198, eq. 2.
_LAYER_BYTES_16_BIT = 34


def predict_memory(
    config: Any, lora: LoraSection, *, freeze_vision: bool, sequences: int, longest: int | None
) -> dict[str, Any]:
    """Bytes by kind of training and dtype, and estimates of what comes on top.

    Args:
        config: The model's configuration.
        lora: The adapter that would train.
        freeze_vision: Whether the vision tower trains.
        sequences: How many sequences one micro-step holds.
        longest: Tokens of the longest; None where it is not known.
    """
    training = []
    for dtype in _DTYPES:
        with torch.device("meta"):
            model = AutoModelForImageTextToText.from_config(config, dtype=dtype)
        if freeze_vision:
            vision_module(model)[1].requires_grad_(False)
        training.append(_entry("full", dtype, Footprint.of(model)))
        with torch.device("meta"):
            adapted = add_adapter(
                model,
                rank=lora.r,
                alpha=lora.alpha,
                targets=lora.targets,
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
    """What a micro-step of the longest row keeps, and what generation keeps a token."""
    text = config.get_text_config()
    layers = getattr(text, "num_hidden_layers", None)
    hidden = getattr(text, "hidden_size", None)
    heads = getattr(text, "num_attention_heads", None)
    if not layers or not hidden or not heads:
        return []
    # some configurations have the keys and no values
    key_value_heads = getattr(text, "num_key_value_heads", None) or heads
    head_dim = getattr(text, "head_dim", None) or hidden // heads
    estimates = []
    for dtype in _DTYPES:
        per_layer = hidden * _LAYER_BYTES_16_BIT * dtype.itemsize // 2
        # with checkpointing: the input of every layer, and all of the one that is computed again
        checkpointed = layers * hidden * dtype.itemsize + per_layer
        tokens = None if longest is None else sequences * longest
        estimates.append(
            {
                "dtype": str(dtype).removeprefix("torch."),
                "activations_bytes": None if tokens is None else tokens * layers * per_layer,
                "activations_with_checkpointing_bytes": None
                if tokens is None
                else tokens * checkpointed,
                "generation_cache_bytes_a_token": 2
                * layers
                * key_value_heads
                * head_dim
                * dtype.itemsize,
            }
        )
    return estimates
