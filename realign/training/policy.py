"""The policy: loading of the model, its frozen parts and its adapters."""

from __future__ import annotations

from typing import Any

import torch
from torch import nn

from realign.config import TrainConfig
from realign.errors import RefusedError
from realign.modeling.adapter_folder import read_weights, wrap_model
from realign.modeling.adapters import add_adapter, keep_adapters_in_float32
from realign.modeling.folder import is_adapter, lasting_name
from realign.modeling.loading import load_model
from realign.modeling.parts import check_projector_rate, freeze_parts, frozen_parts
from realign.training.plan import TrainPlan


def load_policy(plan: TrainPlan) -> Any:
    """Load the model with its weights and prepare the parts that train.

    Raises:
        RefusedError: The folder lacks weights, or the options fit no part of the model.
    """
    model: Any = load_model(
        plan.folder, plan.numerics, trainable_adapter=True, name=lasting_name(plan.config.model)
    )
    model = _prepare(model, plan.config, is_adapted=is_adapter(plan.folder))
    if plan.config.gradient_checkpointing:
        checkpoint_activations(model)
    return model


def outline_policy(plan: TrainPlan) -> nn.Module:
    """Return the policy without weights, on torch's meta device, to see what would train. The
    plan's outline of the model is modified in place.

    Raises:
        RefusedError: The options fit no part of the model, or an adapter does not fit its base.
    """
    model = plan.model.outline
    with torch.device("meta"):
        if is_adapter(plan.folder):
            model = wrap_model(model, plan.folder)
            read_weights(plan.folder, model)
            keep_adapters_in_float32(model)
        prepared: nn.Module = _prepare(model, plan.config, is_adapted=is_adapter(plan.folder))
        return prepared


def _prepare(model: Any, config: TrainConfig, *, is_adapted: bool) -> Any:
    if config.lora and is_adapted:
        raise RefusedError(
            f"train.lora must not be set when model {config.model} is an adapter already: it would "
            "be overwritten. Drop train.lora to train that adapter on, or `realign merge` it first."
        )
    frozen = {
        "freeze_vision": config.freeze_vision,
        "freeze_projector": config.freeze_projector,
        "freeze_language": config.freeze_language,
    }
    if config.lora:
        model = add_adapter(
            model,
            rank=config.lora.r,
            alpha=config.lora.alpha,
            targets=config.lora.targets,
            train_projector=config.train_projector,
            **frozen,
        )
    freeze_parts(
        model, frozen_parts(**{name.removeprefix("freeze_"): on for name, on in frozen.items()})
    )
    check_projector_rate(model, config.projector_learning_rate)
    return model


def checkpoint_activations(model: Any) -> None:
    """Recompute activations in the backward pass instead of keeping them."""
    options = {"use_reentrant": False}  # the reentrant kind requires inputs with a gradient
    # transformers 5.23 renamed the method
    if hasattr(model, "activation_checkpointing_enable"):
        model.activation_checkpointing_enable(activation_checkpointing_kwargs=options)
    else:
        model.gradient_checkpointing_enable(gradient_checkpointing_kwargs=options)
