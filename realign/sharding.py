"""FSDP2 as accelerate sets it up, with what a vision-language model and this loss need of it."""

from __future__ import annotations

from typing import Any

from torch import nn


def layers_to_shard(model: nn.Module) -> list[str]:
    """Class names of the layers that FSDP2 gathers one at a time: those that the model says must
    not be split and that are in it.

    accelerate refuses a class that is not there, and LLaVA names those of CLIP's text encoder.
    """
    there = {type(module).__name__ for module in model.modules()}
    return sorted(there & set(getattr(model, "_no_split_modules", None) or ()))


def set_up_fsdp(accelerator: Any, model: nn.Module) -> None:
    """Complete what ``accelerate launch`` configured, before the model is wrapped."""
    plugin = accelerator.state.fsdp_plugin
    if plugin.transformer_cls_names_to_wrap is None:
        plugin.transformer_cls_names_to_wrap = layers_to_shard(model)
