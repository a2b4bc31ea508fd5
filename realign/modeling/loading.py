"""Loading of VLMs."""

from __future__ import annotations

import os
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import torch
from transformers import AutoModelForImageTextToText, PreTrainedModel

from realign.errors import RefusedError
from realign.modeling.acceleration import Numerics, use_liger_layers
from realign.modeling.adapter_folder import check_adapter, load_adapter
from realign.modeling.damaged_files import refuse_damaged_files
from realign.modeling.folder import adapter_base, is_adapter, resolve_base
from realign.modeling.model_config import load_model_config
from realign.modeling.parts import disable_dropout
from realign.modeling.preference_forward import attach_preference_forward

LOADING = "FSDP_CPU_RAM_EFFICIENT_LOADING"


def choose_dtype(dtype: str) -> torch.dtype:
    """Return the dtype of a name. ``auto`` is bfloat16 on a GPU, and float32 on a CPU, where
    products in bfloat16 are slow.
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
    """Load a VLM, or an adapter on its base, with dropout off. Remote code is never run.

    Args:
        folder: Folder from :func:`realign.resolve_model`.
        numerics: Numerics of the model, or only the dtype of its weights.
        trainable_adapter: Whether an adapter will be trained further.
        name: Name that adapters trained on this model will give for their base; a hub id is valid
            on other machines too.
        scoring: Whether the model will score answers. A model that only generates may transform its
            logits in any way.
    Raises:
        RefusedError: The folder holds no VLM that transformers knows, a weight is missing or
            damaged, or the model cannot be scored.

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
        check_adapter(folder)  # before the base is loaded, which takes longer
        base = load_model(
            resolve_base(folder), numerics, name=adapter_base(folder), scoring=scoring
        )
        return load_adapter(base, folder, is_trainable=trainable_adapter)
    if not any(folder.glob("*.safetensors")):
        raise RefusedError(f"model {folder} must hold safetensors weights, got none. Convert it.")
    load_model_config(folder)  # refuses other models and damaged configurations
    with refuse_damaged_files(f"model {folder}"):
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


@contextmanager
def every_rank_loads() -> Iterator[None]:
    """Within the block, let every rank load all weights, also under fsdp_cpu_ram_efficient_loading,
    where the first rank loads them for all: weights that are not sharded would never be sent.
    """
    setting = os.environ.pop(LOADING, None)
    try:
        yield
    finally:
        if setting is not None:
            os.environ[LOADING] = setting
