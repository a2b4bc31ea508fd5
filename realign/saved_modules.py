"""Modules that train in full beside an adapter (peft's ``modules_to_save``), kept in float32."""

from __future__ import annotations

import functools
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn


def keep_saved_modules_in_float32(model: nn.Module, folder: Path | None = None) -> None:
    """Keep the weights of the modules that train in full in float32, as peft keeps adapters, and
    compute with them in the model's own 16 bits: an update of 1e-5 vanishes in bfloat16, and a
    module that has not moved must compute what the reference does, to the last bit.

    Args:
        model: A peft model; one without such modules, or in float32, stays as it is.
        folder: Where the adapter was loaded from, in the base's dtype; its weights are read again.
    """
    from peft import load_peft_weights, set_peft_model_state_dict
    from peft.utils import ModulesToSaveWrapper

    is_changed = False
    for module in model.modules():
        if not isinstance(module, ModulesToSaveWrapper):
            continue
        for copy in module.modules_to_save.values():
            dtype = next(copy.parameters()).dtype
            if dtype in (torch.bfloat16, torch.float16):
                copy.float()
                copy.forward = functools.partial(_computed_in, dtype, copy.forward)
                is_changed = True
    if is_changed and folder is not None:
        set_peft_model_state_dict(model, load_peft_weights(str(folder), device="cpu"))


def _computed_in(dtype: torch.dtype, forward: Callable[..., Tensor], *args: Any) -> Tensor:
    with torch.autocast(args[0].device.type, dtype):
        return forward(*args).to(dtype)
