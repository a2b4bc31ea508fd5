"""What trains of an adapted model stays in float32 and computes in the 16 bits of its base."""

from __future__ import annotations

import functools
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

_HALVES = (torch.bfloat16, torch.float16)


def keep_adapters_in_float32(model: nn.Module, folder: Path | None = None) -> None:
    """Keep adapters and modules that train in full beside them (peft's ``modules_to_save``) in
    float32, and compute with them in the base's own 16 bits.

    An update of 1e-5 vanishes in bfloat16. A module that has not moved must compute what the
    reference does, to the last bit. And products in float32, which peft has of its adapters, cost
    a GPU some fifteen times those in bfloat16: with rank 128 as much as the base's.

    Args:
        model: A peft model; one in float32 computes as before.
        folder: Where the adapter was loaded from, in the base's dtype; the weights of its saved
            modules are read again.
    """
    from peft import load_peft_weights, set_peft_model_state_dict
    from peft.tuners.lora import LoraLayer
    from peft.utils import ModulesToSaveWrapper

    is_changed = False
    for module in model.modules():
        if isinstance(module, LoraLayer):
            module.cast_input_dtype_enabled = False
            for layer in (*module.lora_A.values(), *module.lora_B.values()):
                layer.forward = functools.partial(_in_dtype_of_input, layer.forward)
        if not isinstance(module, ModulesToSaveWrapper):
            continue
        for copy in module.modules_to_save.values():
            dtype = next(copy.parameters()).dtype
            if dtype in _HALVES:
                copy.float()
                copy.forward = functools.partial(_computed_in, dtype, copy.forward)
                is_changed = True
    if is_changed and folder is not None:
        set_peft_model_state_dict(model, load_peft_weights(str(folder), device="cpu"))


def _computed_in(dtype: torch.dtype, forward: Callable[..., Tensor], *args: Any) -> Tensor:
    with torch.autocast(args[0].device.type, dtype):
        return forward(*args).to(dtype)


def _in_dtype_of_input(forward: Callable[[Tensor], Tensor], states: Tensor) -> Tensor:
    """An adapter's product; in float32, or under an autocast of the caller's, as it is."""
    if states.dtype not in _HALVES:
        return forward(states)
    with torch.autocast(states.device.type, states.dtype):
        return forward(states)
