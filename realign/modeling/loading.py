"""Loading of VLMs and their configurations."""

from __future__ import annotations

import os
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from transformers import AutoConfig, AutoModelForImageTextToText, PreTrainedModel

from realign.errors import RefusedError
from realign.modeling.acceleration import Numerics, use_liger_layers
from realign.modeling.adapter_folder import check_adapter, load_adapter
from realign.modeling.folder import adapter_base, is_adapter, resolve_base
from realign.modeling.parts import disable_dropout
from realign.modeling.preference_forward import attach_preference_forward

LOADING = "FSDP_CPU_RAM_EFFICIENT_LOADING"


def choose_dtype(dtype: str) -> torch.dtype:
    """Return the dtype with a name; ``auto`` is bfloat16 on a GPU and float32 on a CPU, where
    bfloat16 products are slow.
    """
    if dtype == "auto":
        return torch.bfloat16 if torch.cuda.is_available() else torch.float32
    return {"float32": torch.float32, "bfloat16": torch.bfloat16}[dtype]


def load_model(
    folder: Path,
    numerics: Numerics | torch.dtype,
    *,
    trainable_adapter: bool = False,
    name: str | None = None,
    scoring: bool = True,
) -> PreTrainedModel:
    """Load a VLM, or an adapter on its base, with dropout off; remote code is never run.

    Args:
        folder: From :func:`resolve_model`.
        numerics: Numerics of the model; a dtype alone is that of its weights, with transformers'
            defaults otherwise.
        trainable_adapter: Whether an adapter will be trained further.
        name: Name of the model in the adapters that are trained on it; a hub id is valid on other
            machines too.
        scoring: Whether the model will score answers; a model that only generates may transform its
            logits in any way.
    Raises:
        RefusedError: The folder lacks a weight, or holds one that does not belong to the model.

    Example::

        >>> import torch
        >>> from realign import load_model, resolve_model
        >>> model = load_model(resolve_model("model"), torch.float32)
        >>> model.config.model_type
        'llava'
    """
    if isinstance(numerics, torch.dtype):
        numerics = Numerics(numerics)
    if is_adapter(folder):
        check_adapter(folder)  # reading the base takes longer
        base = load_model(
            resolve_base(folder), numerics, name=adapter_base(folder), scoring=scoring
        )
        return load_adapter(base, folder, is_trainable=trainable_adapter)
    if not any(folder.glob("*.safetensors")):
        raise RefusedError(f"model {folder} must hold safetensors weights, got none. Convert it.")
    model, found = AutoModelForImageTextToText.from_pretrained(
        folder, use_safetensors=True, output_loading_info=True, **numerics.loading()
    )
    if lacking := sorted([*found["missing_keys"], *found["mismatched_keys"]]):
        raise RefusedError(
            f"model {folder} must hold every weight, lacks {len(lacking)}, first: {lacking[0]}. "
            "Download it again."
        )
    if name:
        model.name_or_path = model.config._name_or_path = name
    disable_dropout(model)
    if numerics.liger:
        use_liger_layers(model)
    if scoring:
        attach_preference_forward(model)
    return model


def load_model_config(folder: Path) -> Any:
    """Load the configuration of a model folder, or of an adapter's base."""
    return AutoConfig.from_pretrained(resolve_base(folder) if is_adapter(folder) else folder)


@contextmanager
def every_rank_loads() -> Iterator[None]:
    """Let every rank load all weights within the block, even if the first one is configured to load
    them for all (fsdp_cpu_ram_efficient_loading): unsharded weights are not sent to the others.
    """
    setting = os.environ.pop(LOADING, None)
    try:
        yield
    finally:
        if setting is not None:
            os.environ[LOADING] = setting
