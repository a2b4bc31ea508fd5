"""Low-rank adapters on a VLM."""

from __future__ import annotations

from typing import Any

from torch import nn

from realign.modeling import quiet_peft, vision_module


def add_adapter(
    model: nn.Module, *, rank: int, alpha: int, targets: str | list[str], freeze_vision: bool
) -> Any:
    """Put a new adapter on a model, which then trains alone.

    Args:
        model: The base; on the meta device too.
        rank: Of the adapter.
        alpha: Scaling numerator.
        targets: Module names, or ``all-linear``.
        freeze_vision: Whether the vision tower gets none.
    """
    from peft import LoraConfig, get_peft_model

    exclude = rf".*{vision_module(model)[0].rpartition('.')[2]}.*" if freeze_vision else None
    lora = LoraConfig(
        r=rank,
        lora_alpha=alpha,
        lora_dropout=0.0,
        target_modules=targets,
        exclude_modules=exclude,
    )
    with quiet_peft():
        return get_peft_model(model, lora)
