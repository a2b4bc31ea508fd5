"""Forecast of the memory that training a model would take, from its configuration alone."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from transformers import AutoModelForImageTextToText

from realign.modeling.adapters import add_adapter
from realign.modeling.memory import Footprint, decoder_shape, micro_step_bytes
from realign.modeling.parts import freeze_parts, frozen_parts

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
    """Return bytes by kind of training and dtype, and estimates of what comes on top.

    Args:
        config: The model's configuration.
        rank: Of the LoRA adapter that would train.
        alpha: Numerator of its scaling.
        targets: The layers that it adapts.
        freeze_vision: Whether the vision tower trains.
        sequences: How many sequences one micro-step holds.
        longest: Tokens of the longest; None where it is not known.
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
    """Return what a micro-step of the longest row keeps, and what generation keeps per token."""
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
