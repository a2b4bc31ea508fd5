"""What makes a model compute faster or smaller, by packages that need a GPU: flash-attention,
Liger's layers, 4-bit weights. What cannot be had is refused, never replaced.

None of it has run on a GPU in this project yet; docs/training.md says what was tested how.
"""

from __future__ import annotations

import inspect
from importlib.util import find_spec
from typing import Any

import torch
from torch import nn
from transformers import BitsAndBytesConfig, PreTrainedModel

from realign.errors import RefusedError
from realign.model_parts import PROJECTOR_MODULES, VISION_MODULES, part_of

# option value -> the package that it needs
_PACKAGES = {"flash": "flash-attn", "liger": "liger-kernel", "nf4": "bitsandbytes"}
_MODULES = {"flash": "flash_attn", "liger": "liger_kernel", "nf4": "bitsandbytes"}
# transformers' names
ATTENTION_IMPLEMENTATIONS = {"sdpa": "sdpa", "flash": "flash_attention_2"}


def check_acceleration(
    *, attention: str, liger: bool, quantization: str | None, dtype: torch.dtype
) -> None:
    """Refuse what this machine cannot do.

    Args:
        attention: ``sdpa`` or ``flash``.
        liger: Whether Liger's layers are wanted.
        quantization: ``nf4`` or None.
        dtype: That the model computes in.
    Raises:
        RefusedError: A package or a GPU is missing, or the dtype does not fit.
    """
    wanted = {
        "flash": ("attention: flash", attention == "flash"),
        "liger": ("liger: true", liger),
        "nf4": ("quantization: nf4", quantization == "nf4"),
    }
    for name, (option, is_wanted) in wanted.items():
        if is_wanted and find_spec(_MODULES[name]) is None:
            raise RefusedError(
                f"{option} must have the package {_PACKAGES[name]}, which is not installed. "
                f"Install it (pip install {_PACKAGES[name]}), or drop the option."
            )
        if is_wanted and not torch.cuda.is_available():
            raise RefusedError(
                f"{option} must have a GPU, got a machine without one. Drop the option."
            )
    if attention == "flash" and dtype == torch.float32:
        raise RefusedError(
            "attention: flash must compute in bfloat16, got float32. Use lora or autocast, or "
            "drop it."
        )


def quantization_arguments(quantization: str | None, dtype: torch.dtype) -> dict[str, Any]:
    """What ``from_pretrained`` takes for 4-bit weights: those of the language model's layers alone,
    as the head, the vision tower and the projector are small and sensitive.

    Args:
        quantization: ``nf4`` (with double quantisation, as QLoRA), or None for nothing.
        dtype: That products are computed in.
    """
    if quantization is None:
        return {}
    return {
        "quantization_config": BitsAndBytesConfig(
            load_in_4bit=True,
            bnb_4bit_quant_type=quantization,
            bnb_4bit_use_double_quant=True,
            bnb_4bit_compute_dtype=dtype,
            bnb_4bit_quant_storage=dtype,  # as FSDP needs it, which shards by dtype
            llm_int8_skip_modules=["lm_head", *VISION_MODULES, *PROJECTOR_MODULES],
        )
    }


def quantized_weights(model: Any) -> set[str]:
    """Names of the weights of a model's outline that ``quantization_arguments`` has in 4 bits."""
    head = model.get_output_embeddings()
    return {
        f"{name}.weight"
        for name, module in model.named_modules()
        if isinstance(module, nn.Linear)
        and module is not head
        and part_of(name) == "language"
        and not module.weight.requires_grad  # adapters are linear layers too
    }


def use_liger_layers(model: PreTrainedModel) -> None:
    """Replace the layers of a model's body by Liger's fused ones: normalisation, rotary embedding,
    MLP. Its losses are left alone, the head here has its own.

    Raises:
        RefusedError: Liger knows neither the model's family nor that of its language model.
    """
    from liger_kernel.transformers.monkey_patch import MODEL_TYPE_TO_APPLY_LIGER_FN

    body: Any = model.model
    candidates = (
        (model.config.model_type, model),
        (model.config.get_text_config().model_type, getattr(body, "language_model", None)),
    )
    for model_type, module in candidates:
        if model_type in MODEL_TYPE_TO_APPLY_LIGER_FN and module is not None:
            apply = MODEL_TYPE_TO_APPLY_LIGER_FN[model_type]
            known = inspect.signature(apply).parameters
            losses = ("cross_entropy", "fused_linear_cross_entropy")
            apply(model=module, **{name: False for name in losses if name in known})
            return
    raise RefusedError(
        f"liger: true must have a model that liger-kernel knows, got {model.config.model_type!r}. "
        "Drop it."
    )
