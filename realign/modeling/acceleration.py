"""Numerics of a model: the dtype of its weights, the layout of its rows, and the packages that make
it faster or smaller on a GPU (flash-attention, Liger's layers, 4-bit weights). An unavailable
option is refused, never replaced.

None of these packages has run on a GPU in this project yet; docs/guides/training.md lists the
tests.
"""

from __future__ import annotations

import sys
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field, fields
from importlib.util import find_spec
from typing import Any

import torch
import transformers
from torch import nn
from transformers import BitsAndBytesConfig, PreTrainedModel
from transformers.integrations.liger import apply_liger_kernel

from realign.errors import RefusedError
from realign.modeling.parts import PROJECTOR_MODULES, VISION_MODULES, part_of

# option value -> the package that it requires, and the package's module
_PACKAGES = {
    "flash": ("flash-attn", "flash_attn"),
    "liger": ("liger-kernel", "liger_kernel"),
    "nf4": ("bitsandbytes", "bitsandbytes"),
}
# transformers' names. Its default, None, is SDPA wherever a part supports it; Gemma-2 does not,
# because it caps its attention scores.
_ATTENTIONS = {"sdpa": None, "flash": "flash_attention_2"}


@dataclass(frozen=True)
class Numerics:
    """Numerics of a model, in which policy and reference must not differ.

    Attributes:
        dtype: The dtype of the weights.
        shared_prefix: Whether the answers of a pair share one prefix; None shares if the model can.
        attention: ``sdpa``, or ``flash`` for flash-attention 2.
        liger: Whether Liger's fused layers replace those of the model's body.
        quantization: ``nf4`` for 4-bit weights of the language model, or None.
        autocast: Whether products are computed in bfloat16 over weights in float32.
        more: Further options, by name, that a section declares as changing numbers; they are part
            of the identity.

    Example::

        >>> import torch
        >>> from realign import Numerics
        >>> Numerics(torch.float32, autocast=True).attention
        'sdpa'
    """

    dtype: torch.dtype
    shared_prefix: bool | None = None
    attention: str = "sdpa"
    liger: bool = False
    quantization: str | None = None
    autocast: bool = False
    more: Mapping[str, Any] = field(default_factory=dict)

    @classmethod
    def of(cls, options: Mapping[str, Any], dtype: torch.dtype) -> Numerics:
        """Return the numerics of a section's options that change numbers.

        Args:
            options: From :meth:`realign.config.Section.marked`.
            dtype: The dtype of the weights, which the section may have left open.
        """
        own = {attribute.name for attribute in fields(cls)} & options.keys()
        more = {name: options[name] for name in options.keys() - own}
        return cls(**{name: options[name] for name in own} | {"dtype": dtype}, more=more)

    def identity(self) -> dict[str, Any]:
        """Return these numerics as they are stored with computed values.

        ``shared_prefix`` is left out, since the layout that follows from it is stored.
        """
        names = [attribute.name for attribute in fields(self)]
        left_out = ("dtype", "shared_prefix", "more")
        return {
            "dtype": str(self.dtype).removeprefix("torch."),
            **{name: getattr(self, name) for name in names if name not in left_out},
            **self.more,
        }

    def check(self) -> None:
        """Refuse numerics that this machine cannot compute.

        Raises:
            RefusedError: A package or a GPU is missing, or flash-attention would need float32.
        """
        wanted = {
            "flash": ("attention: flash", self.attention == "flash"),
            "liger": ("liger: true", self.liger),
            "nf4": ("quantization: nf4", self.quantization == "nf4"),
        }
        for name, (option, is_wanted) in wanted.items():
            if not is_wanted:
                continue
            package, module = _PACKAGES[name]
            if find_spec(module) is None:
                raise RefusedError(
                    f"{option} requires the package {package}, which is not installed. Run "
                    f"`pip install {package}`, or drop the option."
                )
            if not torch.cuda.is_available():
                raise RefusedError(
                    f"{option} requires a GPU, got a machine without one. Drop the option."
                )
        if self.attention == "flash" and self.dtype == torch.float32 and not self.autocast:
            raise RefusedError(
                "attention: flash requires bfloat16, got float32. Use lora or autocast, or drop it."
            )

    def loading(self) -> dict[str, Any]:
        """Return the arguments of ``from_pretrained`` for these numerics."""
        options: dict[str, Any] = {
            "dtype": self.dtype,
            "attn_implementation": _ATTENTIONS[self.attention],
        }
        if self.quantization is not None:
            options["quantization_config"] = BitsAndBytesConfig(
                load_in_4bit=True,
                bnb_4bit_quant_type=self.quantization,
                bnb_4bit_use_double_quant=True,  # as QLoRA does
                bnb_4bit_compute_dtype=self.dtype,
                bnb_4bit_quant_storage=self.dtype,  # FSDP shards tensors of one dtype together
                # only the language model is quantized: the other parts are small and sensitive
                llm_int8_skip_modules=["lm_head", *VISION_MODULES, *PROJECTOR_MODULES],
            )
        return options


def quantized_weights(model: Any) -> set[str]:
    """Return the names of the weights of a model's outline that are quantized to 4 bits."""
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
    """Replace normalization and MLP of a model's body by Liger's fused layers.

    Other models of the process keep their layers. The rotary embedding is therefore not replaced:
    Liger replaces it for all models at once.

    Raises:
        RefusedError: Liger supports neither the model's family nor that of its language model, or
            the installed release does not fit that of transformers.
    """
    from liger_kernel.transformers.monkey_patch import MODEL_TYPE_TO_APPLY_LIGER_FN

    body: Any = model.model
    for module in (model, getattr(body, "language_model", None)):
        # apply_liger_kernel would silently ignore a model that it does not know
        if module is not None and module.config.model_type in MODEL_TYPE_TO_APPLY_LIGER_FN:
            kinds = {"rope": False, "cross_entropy": False, "fused_linear_cross_entropy": False}
            try:
                with _unchanged_classes():
                    apply_liger_kernel(module, kinds)
            except ImportError as error:  # a class of another release of transformers
                reason = str(error).partition(" from ")[0]
                raise RefusedError(
                    f"liger: true requires a liger-kernel that fits {module.config.model_type!r} "
                    f"of transformers {transformers.__version__} ({reason}). Install another "
                    "release of it, or drop the option."
                ) from None
            return
    raise RefusedError(
        "liger: true requires a model that liger-kernel supports, got "
        f"{model.config.model_type!r}. Drop it."
    )


@contextmanager
def _unchanged_classes() -> Iterator[None]:
    """Restore the contents of transformers' modules after the block: Liger also replaces classes
    there, and later models would be made of them.
    """
    before = {
        module: dict(vars(module))
        for name, module in sys.modules.items()
        if name.startswith("transformers.models.")
    }
    try:
        yield
    finally:
        for module, names in before.items():
            for name, value in names.items():
                if vars(module).get(name) is not value:
                    setattr(module, name, value)
