"""Sharded training by accelerate, completed for vision-language models and this loss."""

from __future__ import annotations

import os
import warnings
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn
from torch.distributed.fsdp import MixedPrecisionPolicy
from transformers import TrainerCallback
from transformers.integrations.deepspeed import is_deepspeed_zero3_enabled

from realign.errors import RefusedError

_DTYPES = {"bf16": torch.bfloat16, "fp16": torch.float16}


def set_up_fsdp(accelerator: Any, model: nn.Module) -> None:
    """Complete the configuration of ``accelerate launch``, before the model is wrapped.

    Raises:
        RefusedError: FSDP1 is configured, which cannot hold frozen and trained weights together.
    """
    plugin = accelerator.state.fsdp_plugin
    if plugin.fsdp_version != 2:
        raise RefusedError(
            f"fsdp_version must be 2, got {plugin.fsdp_version}. Set fsdp_version: 2 in the "
            "configuration of accelerate, as in recipes/accelerate/fsdp2.yaml."
        )
    if plugin.transformer_cls_names_to_wrap is None:
        plugin.transformer_cls_names_to_wrap = layers_to_shard(model)
    if accelerator.mixed_precision in _DTYPES:
        plugin.mixed_precision_policy = MixedPrecisionPolicy(
            param_dtype=_DTYPES[accelerator.mixed_precision],
            reduce_dtype=torch.float32,
            # accelerate would round the loss and the reference's log-probabilities, which are
            # inputs, to 16 bits
            cast_forward_inputs=False,
        )
    # about the loss and the log-probabilities, which nothing changes in place
    warnings.filterwarnings("ignore", message="FSDP2-wrapped module .* returned a view tensor")


def keep_reference(prepare: Callable[..., Any], inputs: dict[str, Any], device: Any) -> Any:
    """Return a batch as a Trainer prepares it, except that the reference's log-probabilities keep
    their precision: DeepSpeed rounds floating-point inputs to its dtype, and the loss requires
    their last digits.
    """
    ref_logps, inputs = inputs.get("ref_logps"), prepare(inputs)
    return inputs if ref_logps is None else {**inputs, "ref_logps": ref_logps.to(device)}


def check_precision(dtype: torch.dtype, *, autocast: bool) -> None:
    """Refuse a mixed precision that the launcher sets, but that the reference is not computed in.

    Raises:
        RefusedError: accelerate's configuration sets one while ``autocast`` is off, or DeepSpeed
            computes in another dtype than that of the weights.
    """
    precision = os.environ.get("ACCELERATE_MIXED_PRECISION", "no")
    is_deepspeed = os.environ.get("ACCELERATE_USE_DEEPSPEED", "false").lower() == "true"
    if precision != "no" and not autocast and not is_deepspeed:
        raise RefusedError(
            f"mixed_precision must be 'no' in the configuration of accelerate, got {precision}: "
            "the reference would be computed in another precision. Set train.autocast to true for "
            "bfloat16 instead."
        )
    if is_deepspeed and precision == "bf16" and dtype != torch.bfloat16:
        raise RefusedError(
            f"train.dtype must be bfloat16 under DeepSpeed's bf16, got {dtype}: the reference "
            "would be computed in another precision. Set train.dtype to bfloat16; DeepSpeed keeps "
            "float32 copies of what trains."
        )


def check_data_parallel(accelerator: Any) -> None:
    """Refuse a configuration in which ranks share the rows of a pair.

    Raises:
        RefusedError: Tensor, context or sequence parallelism is configured.
    """
    config = getattr(accelerator, "parallelism_config", None)
    for name in ("tp_size", "cp_size", "sp_size"):
        if (size := getattr(config, name, 1) or 1) > 1:
            raise RefusedError(
                f"parallelism_config.{name} must be 1, got {size}: every rank trains on pairs of "
                "its own. Drop it from the configuration of accelerate."
            )


def whole_weights(accelerator: Any, model: nn.Module) -> dict[str, Tensor]:
    """Return the gathered weights by name, on the CPU of the first rank; all ranks must call it.

    Tied weights become one tensor again, so that ``save_pretrained`` writes them once.
    """
    weights: dict[str, Tensor] = accelerator.get_state_dict(model)
    for name, source in getattr(model, "all_tied_weights_keys", {}).items():
        if name in weights and source in weights and weights[name].equal(weights[source]):
            weights[name] = weights[source]
    return weights


class GatherHead(TrainerCallback):
    """Callback that makes ZeRO-3 gather the output projection with the whole model: DeepSpeed
    gathers only modules that are called, and the loss reads the projection's weight without calling
    it. Not tested yet, since ZeRO-3 requires a GPU.
    """

    def on_train_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """Register the weights, which have been partitioned."""
        if not is_deepspeed_zero3_enabled():
            return
        from deepspeed.zero import register_external_parameter

        model = kwargs["model"]
        for parameter in model.get_output_embeddings().parameters():
            register_external_parameter(model, parameter)


def layers_to_shard(model: nn.Module) -> list[str]:
    """Return the class names of the layers that FSDP2 gathers one at a time: those that the model
    declares as indivisible and contains.

    accelerate refuses a class that the model does not contain, and LLaVA declares classes of CLIP's
    text encoder.
    """
    classes = {type(module).__name__ for module in model.modules()}
    return sorted(classes & set(getattr(model, "_no_split_modules", None) or ()))
