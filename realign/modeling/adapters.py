"""Low-rank adapters on a VLM, and a projector that is fully trained beside them."""

from __future__ import annotations

import functools
import re
import warnings
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn

from realign.errors import RefusedError
from realign.modeling.parts import frozen_parts, part_of, parts_pattern, projector_modules

_16_BIT_DTYPES = (torch.bfloat16, torch.float16)
ALL_LINEAR = "all-linear"


@contextmanager
def quiet_peft() -> Iterator[None]:
    """Silence warnings of peft 0.21: it reads a property that transformers 5.23 renamed, and
    whenever it saves, it asks the hub for the base's configuration to compare vocabularies.
    """
    with warnings.catch_warnings():
        warnings.filterwarnings(
            "ignore", message=".*is_gradient_checkpointing", category=FutureWarning
        )
        for message in ("Could not find a config file in", "Unable to fetch remote file"):
            warnings.filterwarnings("ignore", message=message, category=UserWarning)
        yield


def keep_adapters_in_float32(model: nn.Module, weights: Mapping[str, Tensor] | None = None) -> None:
    """Keep the weights of adapters and of modules that are fully trained beside them (peft's
    ``modules_to_save``) in float32, but compute with them in the base's own 16 bits.

    Updates of 1e-5 vanish in bfloat16 weights. Products in float32, which peft uses for adapters,
    are some fifteen times slower on a GPU than those in bfloat16: with rank 128 they take as long
    as the base. And a module that has not changed yet must compute exactly what the reference does.

    Args:
        model: A peft model, changed in place; one in float32 computes as before.
        weights: Weights of the adapter, which peft has rounded to the base's dtype in modules that
            are fully trained; they are loaded again into the float32 modules.
    """
    from peft import set_peft_model_state_dict
    from peft.tuners.lora import LoraLayer
    from peft.utils import ModulesToSaveWrapper

    is_changed = False
    for module in model.modules():
        if isinstance(module, LoraLayer):
            module.cast_input_dtype_enabled = False
            for layer in (*module.lora_A.values(), *module.lora_B.values()):
                if isinstance(layer, nn.Module):  # those of AdaLoRA are parameters
                    layer.forward = functools.partial(_in_dtype_of_input, layer.forward)
        if not isinstance(module, ModulesToSaveWrapper):
            continue
        for copy in module.modules_to_save.values():
            dtype = next(copy.parameters()).dtype
            if dtype in _16_BIT_DTYPES:
                copy.float()
                copy.forward = functools.partial(_computed_in, dtype, copy.forward)
                is_changed = True
    if is_changed and weights is not None:
        set_peft_model_state_dict(model, weights)


def _computed_in(dtype: torch.dtype, forward: Callable[..., Tensor], *args: Any) -> Tensor:
    with torch.autocast(args[0].device.type, dtype):
        return forward(*args).to(dtype)


def _in_dtype_of_input(forward: Callable[[Tensor], Tensor], states: Tensor) -> Tensor:
    """Compute an adapter's product; inputs in float32 or under autocast stay as they are."""
    if states.dtype not in _16_BIT_DTYPES:
        return forward(states)
    with torch.autocast(states.device.type, states.dtype):
        return forward(states)


def add_adapter(
    model: nn.Module,
    *,
    rank: int,
    alpha: int,
    targets: str | Sequence[str],
    freeze_vision: bool,
    freeze_projector: bool = False,
    freeze_language: bool = False,
    train_projector: bool = False,
) -> Any:
    """Add a new LoRA adapter to a model. Only the adapter trains then, or the adapter and the
    projector.

    Args:
        model: The base, which may be on the meta device.
        rank: Rank of the adapter.
        alpha: Scaling numerator.
        targets: Module names, ``all-linear``, or a regular expression of full module names. The
            output projection is not part of ``all-linear``.
        freeze_vision: Whether the vision tower gets no adapter.
        freeze_projector: Whether the projector gets no adapter.
        freeze_language: Whether the language model gets no adapter.
        train_projector: Whether the projector's own weights train, in float32, and are saved with
            the adapter.
    Raises:
        RefusedError: A target matches no layer that may train; there is no projector to train.

    Example::

        >>> import torch
        >>> from realign import add_adapter, load_model, resolve_model
        >>> base = load_model(resolve_model("model"), torch.float32)
        >>> model = add_adapter(base, rank=8, alpha=16, targets="all-linear", freeze_vision=True)
        >>> model.peft_config["default"].r
        8
    """
    from peft import LoraConfig, get_peft_model

    excluded = parts_pattern(
        frozen_parts(vision=freeze_vision, projector=freeze_projector, language=freeze_language)
    )
    # peft ignores a name that matches nothing, as long as another name matches
    _check_targets(model, targets, excluded)
    projectors = [name for name, _ in projector_modules(model)] if train_projector else []
    if train_projector and not projectors:
        raise RefusedError(
            f"train_projector must not be set for {type(model).__name__}, which has no "
            "projector. Drop it."
        )
    lora = LoraConfig(
        r=rank,
        lora_alpha=alpha,
        lora_dropout=0.0,
        target_modules=targets if isinstance(targets, str) else list(targets),
        # peft warns of a pattern that matches nothing
        exclude_modules=excluded if _any_matches(model, excluded) else None,
        modules_to_save=projectors or None,
    )
    with quiet_peft():
        adapted = get_peft_model(model, lora)
    keep_adapters_in_float32(adapted)
    return adapted


def _any_matches(model: nn.Module, pattern: str) -> bool:
    return any(re.fullmatch(pattern, name) for name, _ in model.named_modules())


def _check_targets(model: nn.Module, targets: str | Sequence[str], excluded: str) -> None:
    layers = [
        name
        for name, module in model.named_modules()
        if isinstance(module, nn.Linear | nn.Embedding | nn.Conv2d | nn.Conv3d)
    ]
    trainable = [name for name in layers if not re.fullmatch(excluded, name)]
    head = getattr(model, "get_output_embeddings", lambda: None)()
    for target in [targets] if isinstance(targets, str) else targets:
        if target == ALL_LINEAR:
            is_found = any(model.get_submodule(name) is not head for name in trainable)
        elif isinstance(targets, str):
            is_found = any(re.fullmatch(target, name) for name in trainable)
        else:
            is_found = any(f".{name}".endswith(f".{target}") for name in trainable)
        if is_found:
            continue
        known = sorted({name.rpartition(".")[2] for name in trainable if not name[-1].isdigit()})
        parts = sorted({part_of(name) for name in layers} - {part_of(name) for name in trainable})
        raise RefusedError(
            f"lora.targets must name layers of the parts that train, got {target!r}, which matches "
            f"none. Layers: {', '.join(known) or 'none'}"
            + (f"; frozen: {', '.join(parts)}." if parts else ".")
            + " Name some of them, or all-linear."
        )
