"""Check that an adapter is in effect, by the logits of its base on a first question."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

import torch

from realign.errors import RefusedError
from realign.generation.generator import Request
from realign.generation.transformers_generator import TransformersGenerator
from realign.modeling.adapters import quiet_peft
from realign.modeling.folder import resolve_base


def adapter_effect(
    generator: TransformersGenerator, folder: Path, request: Request, *, allow_none: bool
) -> float:
    """Return the largest change of a logit by an adapter, over all positions of one prompt.

    Args:
        generator: Generator of the adapter, loaded.
        folder: The adapter's folder.
        request: The question.
        allow_none: Whether an adapter without any effect is accepted.
    Raises:
        RefusedError: The adapter has no effect, and ``allow_none`` is not set.
    """
    inputs = generator.inputs([request])
    model = generator.model
    with_adapter = _logits(model, inputs)
    with quiet_peft(), model.disable_adapter():
        without = _logits(model, inputs)
    difference = float((with_adapter - without).abs().max())
    if difference == 0:
        # weights of the base that an adapter brings along are not switched off with it
        dtype = next(model.parameters()).dtype
        base = TransformersGenerator.load(resolve_base(folder), dtype, 1)
        difference = float((with_adapter - _logits(base.model, inputs)).abs().max())
    if not math.isfinite(difference):
        raise RefusedError(
            f"adapter {folder} must give finite logits on the first question, got a difference "
            f"from its base of {difference}. Give an earlier checkpoint, or another --dtype."
        )
    if difference == 0 and not allow_none:
        raise RefusedError(
            f"adapter {folder} must change the logits of its base on the first question, got a "
            "largest difference of 0: its answers would be those of the base. Give a checkpoint "
            "of a later step, or pass --allow-unchanged-adapter to ask it all the same."
        )
    return difference


@torch.inference_mode()
def _logits(model: Any, inputs: dict[str, torch.Tensor]) -> torch.Tensor:
    logits: torch.Tensor = model(**inputs).logits.float()
    return logits
