"""Checks of what callers pass: options, shapes, dtypes, devices, label values.  Knows no maths.

Values on a GPU are checked by a device-side assertion, never by waiting for the device.
``REALIGN_CHECK=0`` in the environment switches value checks off; metadata checks stay.
"""

from __future__ import annotations

import math
import os
from typing import TYPE_CHECKING

import torch
import torch.distributed as dist
from torch import Tensor
from torch.autograd import forward_ad

from realign_kernels.options import MEMORY_MODES, HeadOptions

if TYPE_CHECKING:
    from realign_kernels.vocabulary import VocabularyShard

_HALF_DTYPES = (torch.float16, torch.bfloat16)
_DTYPES = (*_HALF_DTYPES, torch.float32, torch.float64)


def value_checks_enabled() -> bool:
    """Return whether values, not only shapes and dtypes, are to be checked."""
    return os.environ.get("REALIGN_CHECK", "1") != "0"


def check_options(options: HeadOptions) -> None:
    """Refuse numbers and names that no head can have."""
    for name in ("logit_scale", "temperature", "logit_softcap"):
        value = getattr(options, name)
        if value is not None and not (math.isfinite(value) and value > 0):
            raise ValueError(f"{name} must be finite and > 0, got {value}.")
    if options.lm_head_lora is not None:
        if len(options.lm_head_lora) != 3:
            raise ValueError(
                f"lm_head_lora must be (A, B, scaling), got {len(options.lm_head_lora)} values."
            )
        scaling = options.lm_head_lora[2]
        if not isinstance(scaling, int | float):
            raise TypeError(
                f"lm_head_lora must have a number as scaling, got {type(scaling).__name__}. "
                "It gets no gradient."
            )
        if not math.isfinite(scaling):
            raise ValueError(f"lm_head_lora must have a finite scaling, got {scaling}.")
    for name in ("workspace_bytes", "stash_bytes"):
        if getattr(options, name) < 0:
            raise ValueError(f"{name} must be >= 0, got {getattr(options, name)}.")
    if options.memory not in MEMORY_MODES:
        raise ValueError(f"memory must be one of {list(MEMORY_MODES)}, got {options.memory!r}.")
    if options.group is not None and not (dist.is_available() and dist.is_initialized()):
        raise RuntimeError(
            "group must belong to an initialised torch.distributed, got one without it. "
            "Call torch.distributed.init_process_group first, or pass group=None."
        )


def check_head(
    hidden_states: Tensor, lm_head_weight: Tensor, labels: Tensor, options: HeadOptions
) -> torch.dtype | None:
    """Check the tensors of a head against each other; return what autocast rounds them to."""
    if hidden_states.ndim < 1:
        raise ValueError(
            f"hidden_states must have shape (..., D), got {tuple(hidden_states.shape)}."
        )
    hidden_size = hidden_states.shape[-1]
    if (
        lm_head_weight.ndim != 2
        or lm_head_weight.shape[1] != hidden_size
        or lm_head_weight.shape[0] < 1
    ):
        # A weight that ZeRO-3 has partitioned is empty outside of its context.
        remedy = " Gather it by deepspeed.zero.GatheredParameters."
        raise ValueError(
            f"lm_head_weight must have shape (V, {hidden_size}) with V >= 1 "
            f"to match hidden_states, got {tuple(lm_head_weight.shape)}."
            f"{remedy if lm_head_weight.numel() == 0 else ''}"
        )
    if labels.shape != hidden_states.shape[:-1]:
        raise ValueError(
            f"labels must have shape {tuple(hidden_states.shape[:-1])} to match hidden_states, "
            f"got {tuple(labels.shape)}."
        )
    lora_a, lora_b, _ = options.lm_head_lora or (None, None, None)
    check_transforms(
        hidden_states=hidden_states,
        lm_head_weight=lm_head_weight,
        labels=labels,
        lm_head_bias=options.lm_head_bias,
        **{"lm_head_lora[0]": lora_a, "lm_head_lora[1]": lora_b},
    )
    _check_device("lm_head_weight", lm_head_weight, hidden_states)
    _check_device("labels", labels, hidden_states)
    check_int64("labels", labels)
    allowed, autocast = _check_dtypes(hidden_states, lm_head_weight)
    vocabulary_size = lm_head_weight.shape[0]
    if options.lm_head_bias is not None:
        _check_part("lm_head_bias", options.lm_head_bias, (vocabulary_size,), labels, allowed)
    if lora_a is not None and lora_b is not None:
        rank = lora_a.shape[0] if lora_a.ndim == 2 else 0
        _check_part("lm_head_lora[0]", lora_a, (rank, hidden_size), labels, allowed)
        _check_part("lm_head_lora[1]", lora_b, (vocabulary_size, rank), labels, allowed)
    return autocast


def check_transforms(**tensors: Tensor | None) -> None:
    """Refuse what ``torch.func`` transforms, and what carries a forward-mode tangent.

    An operator without a forward-mode rule returns no tangent, and under vmap tensors do not say
    that they need a gradient: both would give zeros in silence.
    """
    for name, tensor in tensors.items():
        check_no_tangent(name, tensor)
    if not torch._C._are_functorch_transforms_active():
        return
    for name, tensor in tensors.items():
        if tensor is not None and (torch.compiler.is_compiling() or _is_transformed(tensor)):
            raise NotImplementedError(
                f"{name} must be outside of the transforms of torch.func (grad, jvp, vmap and the "
                "like), got it inside of one. Call torch.autograd.grad or backward(); in place of "
                "vmap, hidden_states and labels take any number of leading dimensions."
            )


def check_no_tangent(name: str, tensor: Tensor | None) -> None:
    """Refuse a tensor that carries a forward-mode tangent."""
    if forward_ad._current_level < 0 or tensor is None:
        return
    if forward_ad.unpack_dual(tensor).tangent is not None:
        raise NotImplementedError(
            f"{name} must carry no forward-mode tangent, got one. Take the derivative in reverse "
            "mode, by torch.autograd.grad or backward(), or detach what is constant."
        )


def _is_transformed(tensor: Tensor) -> bool:
    """Return whether a transform that is active would have to differentiate or map a tensor."""
    return tensor.requires_grad or torch._C._functorch.is_functorch_wrapped_tensor(tensor)


def check_int64(name: str, tensor: Tensor) -> None:
    """Refuse ids of any other integer type rather than copy them on every call."""
    if tensor.dtype != torch.int64:
        raise TypeError(f"{name} must be torch.int64, got {tensor.dtype}.")


def check_labels(labels: Tensor, ignore_index: int, vocabulary: VocabularyShard) -> None:
    """Refuse a label that is neither a token id nor ``ignore_index``."""
    if not value_checks_enabled():
        return
    is_bad = (labels != ignore_index) & ((labels < 0) | (labels >= vocabulary.total))
    remedy = "Are the labels those of this tokenizer, and already shifted?"
    rule = f"labels must be in [0, V) or ignore_index {ignore_index}"
    if is_bad.is_cuda:
        assert_on_device(~is_bad.any(), f"{rule}. {remedy}")
    elif is_bad.any():
        index = tuple(torch.nonzero(is_bad)[0].tolist())
        raise ValueError(
            f"{rule}, got {labels[index].item()} at index {index} "
            f"with V = {int(vocabulary.total)}. {remedy}"
        )


def known_number(sequence_lengths: Tensor | None, device: torch.device) -> int | None:
    """Return the number of scored rows where the host knows it and would have to wait for it."""
    if sequence_lengths is None or device.type == "cpu":
        return None
    return int(sequence_lengths.sum())


def scored_positions(is_scored: Tensor, num_rows: int | None) -> Tensor:
    """Return where ``is_scored`` (M,) is true, (N,) int64.

    ``num_rows``, where the caller knows it, saves a GPU's host from waiting for the count.
    """
    if num_rows is None:
        return torch.nonzero(is_scored).squeeze(1)
    if is_scored.is_cuda and value_checks_enabled():
        assert_on_device(
            is_scored.sum() == num_rows,
            f"sequence_lengths must sum to the number of answer tokens, got {num_rows}.",
        )
    return torch.nonzero_static(is_scored, size=num_rows).squeeze(1)


def check_floating(name: str, tensor: Tensor) -> None:
    """Refuse half precision for sums: at -500 nats, neighbours in bfloat16 are two nats apart."""
    if tensor.dtype not in (torch.float32, torch.float64):
        raise TypeError(f"{name} must be torch.float32 or torch.float64, got {tensor.dtype}.")


def check_chosen_present(num_tokens: Tensor) -> None:
    """Refuse pairs without a chosen answer; call with counts that are on the host."""
    empty_pairs = torch.nonzero(num_tokens[0] <= 0).flatten().tolist()
    if empty_pairs:
        raise ValueError(
            "num_tokens must be > 0 in cell 0 (chosen) of every pair, "
            f"got 0 in pairs {empty_pairs[:8]}. "
            "Drop pairs whose chosen answer was masked or truncated away."
        )


def assert_on_device(condition: Tensor, message: str) -> None:
    """Stop the device at its next synchronisation if the condition is false; do not wait for it."""
    torch._assert_async(condition, message)


def _check_dtypes(
    hidden_states: Tensor, lm_head_weight: Tensor
) -> tuple[set[torch.dtype], torch.dtype | None]:
    """Return the dtypes that other parts of the head may have, and the one of autocast if on.

    PEFT keeps low-rank factors in float32 beside a half-precision head.
    """
    for name, tensor in (("hidden_states", hidden_states), ("lm_head_weight", lm_head_weight)):
        if tensor.dtype not in _DTYPES:
            raise TypeError(
                f"{name} must be one of {[str(dtype) for dtype in _DTYPES]}, got {tensor.dtype}."
            )
    has_float64 = torch.float64 in (hidden_states.dtype, lm_head_weight.dtype)
    # Autocast leaves float64 alone, here as in torch's own operators.
    device_type = hidden_states.device.type
    if torch.is_autocast_enabled(device_type) and not has_float64:
        return {*_HALF_DTYPES, torch.float32}, torch.get_autocast_dtype(device_type)
    if lm_head_weight.dtype != hidden_states.dtype:
        raise TypeError(
            f"lm_head_weight must have dtype {hidden_states.dtype} to match hidden_states, "
            f"got {lm_head_weight.dtype}. Cast one of them, or call under torch.autocast."
        )
    return {hidden_states.dtype, torch.float64 if has_float64 else torch.float32}, None


def _check_part(
    name: str, part: Tensor, shape: tuple[int, ...], like: Tensor, allowed: set[torch.dtype]
) -> None:
    """Check a bias or low-rank factor."""
    if part.shape != shape:
        raise ValueError(
            f"{name} must have shape {shape} to match lm_head_weight, got {tuple(part.shape)}."
        )
    _check_device(name, part, like)
    if part.dtype not in allowed:
        raise TypeError(f"{name} must be one of {sorted(map(str, allowed))}, got {part.dtype}.")


def _check_device(name: str, tensor: Tensor, like: Tensor) -> None:
    if tensor.device != like.device:
        raise ValueError(
            f"{name} must be on {like.device} to match hidden_states, got {tensor.device}."
        )
