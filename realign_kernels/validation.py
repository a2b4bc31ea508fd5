"""Checks of the arguments of a call: options, shapes, dtypes, devices, label values.

Values on a GPU are checked by a device-side assertion, never by waiting for the device.
``REALIGN_CHECK=0`` in the environment switches value checks off; metadata checks stay.
"""

from __future__ import annotations

import math
import numbers
import os
import sys
from typing import TYPE_CHECKING, Any

import torch
import torch.distributed as dist
from torch import Tensor
from torch.autograd import forward_ad

from realign_kernels.options import ACCUMULATE_MODES, MEMORY_MODES, NO_INDEX, HeadOptions

if TYPE_CHECKING:
    from collections.abc import Sequence

    from realign_kernels.vocabulary import VocabularyShard

_HALF_DTYPES = (torch.float16, torch.bfloat16)
_DTYPES = (*_HALF_DTYPES, torch.float32, torch.float64)
_SHAPES_OF_PARTS = "A bias has shape (V,), A has (r, D) and B has (V, r)."
_DEFAULT = "Leave it out for the default."


def value_checks_enabled() -> bool:
    """Return whether values, not only shapes and dtypes, are to be checked."""
    return os.environ.get("REALIGN_CHECK", "1") != "0"


def check_options(options: HeadOptions) -> None:
    """Refuse option values that no head can have."""
    for name in ("logit_scale", "temperature", "logit_softcap"):
        value = getattr(options, name)
        if name != "logit_softcap" or value is not None:
            check_number(name, value, above=0.0)
    _check_lora(options.lm_head_lora)
    check_integer("ignore_index", options.ignore_index)
    for name in ("workspace_bytes", "stash_bytes"):
        check_integer(name, getattr(options, name), least=0)
    check_choice("memory", options.memory, MEMORY_MODES)
    check_choice("accumulate", options.accumulate, ACCUMULATE_MODES)
    check_choice("backend", options.backend, None)
    _check_group(options.group)


def check_number(
    name: str, value: Any, *, least: float = -math.inf, above: float = -math.inf
) -> None:
    """Refuse anything but a finite number, or one that is too small."""
    if not is_number(value):
        raise TypeError(
            f"{name} must be a number, got {describe(value)}.{_remedy_of_number(value)}"
        )
    if not (_is_finite(value) and value >= least and value > above):
        bound = f" and > {above:g}" if above > -math.inf else ""
        bound = f" and >= {least:g}" if least > -math.inf else bound
        raise ValueError(f"{name} must be finite{bound}, got {value}. {_DEFAULT}")


def _is_finite(value: Any) -> bool:
    # torch.compile does not trace math.isfinite for a number that changes.
    if isinstance(value, int):
        return -sys.float_info.max <= value <= sys.float_info.max  # that float64 can hold
    return bool(-math.inf < value < math.inf)  # NumPy compares in its own dtype, such as float16


def check_integer(name: str, value: Any, *, least: int | None = None) -> None:
    """Refuse anything but an integer, or one that is too small."""
    if not is_number(value, int, numbers.Integral):
        raise TypeError(f"{name} must be an int, got {describe(value)}.{_remedy_of_number(value)}")
    if not -(2**63) <= value < 2**63:
        raise ValueError(f"{name} must fit 64 bits, got {value}. {_DEFAULT}")
    if least is not None and value < least:
        raise ValueError(f"{name} must be >= {least}, got {value}. {_DEFAULT}")


def check_flag(name: str, value: Any) -> None:
    """Refuse anything but True or False."""
    if not isinstance(value, bool):
        raise TypeError(f"{name} must be True or False, got {describe(value)}. {_DEFAULT}")


def check_choice(name: str, value: Any, choices: Sequence[str] | None) -> None:
    """Refuse anything but a string, and any string that is not one of the choices, if given."""
    if not isinstance(value, str):
        wanted = "a string" if choices is None else f"one of {list(choices)}"
        raise TypeError(
            f"{name} must be {wanted}, got {describe(value)}. Leave it out, or name one."
        )
    if choices is not None and value not in choices:
        raise ValueError(f"{name} must be one of {list(choices)}, got {value!r}. {_DEFAULT}")


def is_number(
    value: Any, builtin: type | tuple[type, ...] = (float, int), general: type = numbers.Real
) -> bool:
    """Return whether a value is a number of Python or NumPy, and not a bool."""
    # `general` comes last: torch.compile does not know it, and only NumPy's numbers need it.
    # `builtin` is a tuple: torch.compile of PyTorch 2.10 does not know a union in a variable.
    return not isinstance(value, bool) and (
        isinstance(value, builtin) or (not isinstance(value, Tensor) and isinstance(value, general))
    )


def _remedy_of_number(value: Any) -> str:
    if isinstance(value, Tensor):
        return " It would get no gradient: pass its .item()."
    return f" {_DEFAULT}" if value is None else " Pass the number itself."


def _check_lora(lora: Any) -> None:
    """Check ``(A, B, scaling)``; shapes and dtypes are checked later, against the head."""
    if lora is None:
        return
    if not isinstance(lora, tuple | list):
        raise TypeError(
            f"lm_head_lora must be (A, B, scaling), got {describe(lora)}. "
            "For a PEFT layer, pass (lora_A.weight, lora_B.weight, scaling)."
        )
    if len(lora) != 3:
        raise ValueError(
            f"lm_head_lora must be (A, B, scaling), got {len(lora)} values. "
            "A has shape (r, D), B has shape (V, r), and scaling is a number."
        )
    lora_a, lora_b, scaling = lora
    check_tensor("lm_head_lora[0]", lora_a)
    check_tensor("lm_head_lora[1]", lora_b)
    if not is_number(scaling):
        raise TypeError(
            f"lm_head_lora must have a number as scaling, got {describe(scaling)}."
            f"{_remedy_of_number(scaling)}"
        )
    if not _is_finite(scaling):
        raise ValueError(f"lm_head_lora must have a finite scaling, got {scaling}. Pass 1.0.")


def _check_group(group: Any) -> None:
    if group is None:
        return
    if isinstance(group, str | int | float | list | tuple | dict | Tensor):
        raise TypeError(
            f"group must be a torch.distributed.ProcessGroup or None, got {describe(group)}. "
            "Pass what torch.distributed.new_group returns."
        )
    if not (dist.is_available() and dist.is_initialized()):
        raise RuntimeError(
            "group must belong to an initialised torch.distributed, got one without it. "
            "Call torch.distributed.init_process_group first, or pass group=None."
        )
    if not isinstance(group, dist.ProcessGroup):
        raise TypeError(
            f"group must be a torch.distributed.ProcessGroup or None, got {describe(group)}. "
            "For a DeviceMesh, pass its get_group()."
        )


def describe(value: Any) -> str:
    """Describe a value for a message."""
    if isinstance(value, Tensor):
        return "a nested tensor" if value.is_nested else f"Tensor of shape {tuple(value.shape)}"
    if isinstance(value, list | tuple) and value and all(isinstance(x, Tensor) for x in value):
        return f"{type(value).__name__} of {len(value)} tensors"
    if isinstance(value, str):
        return repr(value)
    kind = type(value)
    module = kind.__module__
    name = kind.__qualname__
    return name if module == "builtins" else f"{module.partition('.')[0]}'s {name}"


def check_tensor(name: str, value: Any, *, optional: bool = False) -> None:
    """Refuse anything but a dense tensor, and say how to make one."""
    if value is None and optional:
        return
    wanted = "a torch.Tensor or None" if optional else "a torch.Tensor"
    if not isinstance(value, Tensor):
        raise TypeError(
            f"{name} must be {wanted}, got {describe(value)}.{_remedy_of_tensor(value)}"
        )
    if type(value).__name__ == "DTensor":
        raise TypeError(f"{name} must be a plain tensor, got a DTensor. Call .full_tensor().")
    if value.is_nested:
        raise TypeError(f"{name} must be a plain tensor, got a nested one. Pad or pack its rows.")
    if value.layout != torch.strided:
        raise TypeError(f"{name} must be dense, got layout {value.layout}. Call .to_dense().")


def _remedy_of_tensor(value: Any) -> str:
    """Return the remedy that makes a tensor of a value."""
    if isinstance(value, torch.nn.Module):
        return " Pass its .weight." if hasattr(value, "weight") else " Pass one of its parameters."
    for attribute in ("last_hidden_state", "logits", "input_ids"):
        if hasattr(value, attribute):
            return " Pass one of its tensors, such as .last_hidden_state."
    if isinstance(value, list | tuple):
        if value and all(isinstance(entry, Tensor) for entry in value):
            return " Call torch.stack, or pass one of them."
        return " Call torch.as_tensor."
    if hasattr(value, "__array__") or isinstance(value, int | float):
        return " Call torch.as_tensor."
    return " Pass the tensor itself."


def check_head(
    hidden_states: Tensor, lm_head_weight: Tensor, labels: Tensor, options: HeadOptions
) -> torch.dtype | None:
    """Check the tensors of a head against each other.

    Return the dtype that the weight is rounded to, or None where it is not rounded.
    """
    check_tensor("hidden_states", hidden_states)
    check_tensor("lm_head_weight", lm_head_weight)
    check_tensor("labels", labels)
    check_tensor("lm_head_bias", options.lm_head_bias, optional=True)
    swapped = find_swapped(hidden_states, lm_head_weight, labels)
    if hidden_states.ndim < 1 or hidden_states.shape[-1] < 1:
        raise ValueError(
            f"hidden_states must have shape (..., D) with D >= 1, got {tuple(hidden_states.shape)}."
            f"{swapped or ' Pass what the last layer returns.'}"
        )
    if hidden_states.is_meta:
        raise ValueError(
            "hidden_states must hold values, got a meta tensor. Run the model on a real device."
        )
    hidden_size = hidden_states.shape[-1]
    if (
        lm_head_weight.ndim != 2
        or lm_head_weight.shape[1] != hidden_size
        or lm_head_weight.shape[0] < 1
    ):
        remedy = swapped
        if lm_head_weight.numel() == 0:
            # A weight that ZeRO-3 has partitioned is empty outside of its context.
            remedy = " Gather it by deepspeed.zero.GatheredParameters."
        elif not swapped and lm_head_weight.ndim == 2 and lm_head_weight.shape[0] == hidden_size:
            remedy = " It looks transposed: pass its .T."
            if hidden_size > lm_head_weight.shape[1]:  # the larger is the size of the vocabulary
                remedy = " Pass what the last layer returns, not logits."
        elif not swapped and lm_head_weight.ndim != 2:
            remedy = " Pass the .weight of the output projection."
        raise ValueError(
            f"lm_head_weight must have shape (V, {hidden_size}) with V >= 1 "
            f"to match hidden_states, got {tuple(lm_head_weight.shape)}.{remedy}"
        )
    if labels.shape != hidden_states.shape[:-1]:
        remedy = swapped or _remedy_of_labels(labels, hidden_states.shape[:-1])
        raise ValueError(
            f"labels must have shape {tuple(hidden_states.shape[:-1])} to match hidden_states, "
            f"got {tuple(labels.shape)}.{remedy}"
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
    check_int64("labels", labels, swapped)
    allowed, autocast = _check_dtypes(hidden_states, lm_head_weight, swapped)
    vocabulary_size = lm_head_weight.shape[0]
    if options.lm_head_bias is not None:
        _check_part("lm_head_bias", options.lm_head_bias, (vocabulary_size,), labels, allowed)
    if lora_a is not None and lora_b is not None:
        rank = lora_a.shape[0] if lora_a.ndim == 2 else 0
        _check_part("lm_head_lora[0]", lora_a, (rank, hidden_size), labels, allowed)
        _check_part("lm_head_lora[1]", lora_b, (vocabulary_size, rank), labels, allowed)
    return autocast


def check_transforms(**tensors: Tensor | None) -> None:
    """Refuse tensors that ``torch.func`` transforms, and those that carry a forward-mode tangent.

    An operator without a forward-mode rule returns no tangent, and under vmap tensors do not show
    that they require a gradient: both would silently give zeros.
    """
    for name, tensor in tensors.items():
        check_no_tangent(name, tensor)
    if not torch._C._are_functorch_transforms_active():
        return
    for name, tensor in tensors.items():
        if tensor is not None and (torch.compiler.is_compiling() or _is_transformed(tensor)):
            raise NotImplementedError(
                f"{name} must be outside of the transforms of torch.func (grad, jvp, vmap and "
                "others), got it inside one. Call torch.autograd.grad or backward(); instead of "
                "vmap, pass hidden_states and labels with any number of leading dimensions."
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
    """Return whether an active transform would have to differentiate or map a tensor."""
    return tensor.requires_grad or torch._C._functorch.is_functorch_wrapped_tensor(tensor)


def find_swapped(hidden_states: Tensor, lm_head_weight: Tensor, labels: Tensor) -> str:
    """Return a sentence for messages on two arguments that look swapped, or an empty string."""
    given = {"hidden_states": hidden_states, "lm_head_weight": lm_head_weight, "labels": labels}
    not_floating = {name for name, tensor in given.items() if not tensor.is_floating_point()}
    names = None
    if len(not_floating) == 1 and "labels" not in not_floating:
        names = not_floating.pop(), "labels"
    elif (
        labels.shape == lm_head_weight.shape[:-1]
        and labels.shape != hidden_states.shape[:-1]
        and hidden_states.ndim == 2
    ):
        names = "hidden_states", "lm_head_weight"
    return "" if names is None else f" {names[0]} and {names[1]} seem swapped."


def _remedy_of_labels(labels: Tensor, expected: torch.Size) -> str:
    if labels.shape[:-1] == expected:
        return " Drop the last dimension: pass one id per position."
    if labels.ndim == len(expected) and labels.shape[:-1] == expected[:-1]:
        return " Shift both alike: hidden_states[:, :-1] and labels[:, 1:]."
    return " Give one label for every hidden state."


def check_int64(name: str, tensor: Tensor, remedy: str = "") -> None:
    """Refuse ids of any other type rather than copy them on every call."""
    if tensor.dtype != torch.int64:
        raise TypeError(
            f"{name} must be torch.int64, got {tensor.dtype}.{remedy or ' Call .long().'}"
        )


def check_labels(labels: Tensor, ignore_index: int, vocabulary: VocabularyShard) -> None:
    """Refuse a label that is neither a token id nor ``ignore_index``."""
    if not value_checks_enabled():
        return
    is_bad = (labels < 0) | (labels >= vocabulary.total)
    if ignore_index != NO_INDEX:
        is_bad &= labels != ignore_index
    rule, remedy = _label_rule(ignore_index)
    if is_bad.is_cuda:
        assert_on_device(~is_bad.any(), f"{rule}. {remedy}")
    elif is_bad.any():
        index = tuple(torch.nonzero(is_bad)[0].tolist())
        raise ValueError(
            f"{rule}, got {labels[index].item()} at index {index} "
            f"with V = {int(vocabulary.total)}. {remedy}"
        )


def _label_rule(ignore_index: int) -> tuple[str, str]:
    """Return the rule for labels and the remedy, for messages."""
    rule = "labels must be in [0, V)"
    if ignore_index != NO_INDEX:
        rule = f"{rule} or ignore_index {ignore_index}"
    return rule, "Are the labels those of this tokenizer, and already shifted?"


def assert_rows_fit(
    labels_fit: Tensor, number_fits: Tensor | None, ignore_index: int, num_rows: int | None
) -> None:
    """Stop the device if a kernel has found a label out of range or a wrong number of labels."""
    if not value_checks_enabled():
        return
    assert_on_device(labels_fit, ". ".join(_label_rule(ignore_index)))
    if number_fits is not None:
        assert_on_device(number_fits, f"{_NUMBER_RULE}, got {num_rows}.")


_NUMBER_RULE = (
    "num_scored, or the sum of sequence_lengths, must be the number of labels that are not ignored"
)


def known_number(
    sequence_lengths: Tensor | None, device: torch.device, waits: bool = False
) -> int | None:
    """Return the number of scored rows if the host knows it, and counting them would make it wait.

    ``waits`` says that it would wait on a CPU too, as for kernels in Triton's interpreter.
    """
    if sequence_lengths is None or (device.type == "cpu" and not waits):
        return None
    lengths = sequence_lengths.tolist()
    return lengths if isinstance(lengths, int) else sum(map(sum, lengths))


def scored_positions(is_scored: Tensor, num_rows: int | None) -> Tensor:
    """Return the positions where ``is_scored`` (M,) is true, (N,) int64.

    With ``num_rows`` the host does not wait for a GPU to count them.
    """
    if num_rows is None:
        return torch.nonzero(is_scored).squeeze(1)
    if is_scored.is_cuda and value_checks_enabled():
        assert_on_device(
            is_scored.sum() == num_rows,
            f"{_NUMBER_RULE}, got {num_rows}.",
        )
    return torch.nonzero_static(is_scored, size=num_rows).squeeze(1)


def check_num_scored(num_scored: int, positions: Tensor) -> None:
    """Refuse a wrong number of scored labels; on a GPU an assertion has already done so."""
    if value_checks_enabled() and num_scored != len(positions):
        raise ValueError(
            f"num_scored must be the number of labels that are not ignored, {len(positions)}, "
            f"got {num_scored}. Count them on the host, or leave it out."
        )


def check_floating(name: str, tensor: Tensor, remedy: str = "") -> None:
    """Refuse half precision for sums: at -500 nats, neighbours in bfloat16 are two nats apart."""
    if tensor.dtype not in (torch.float32, torch.float64):
        remedy = remedy or " Sum in float32: call .float() before."
        raise TypeError(
            f"{name} must be torch.float32 or torch.float64, got {tensor.dtype}.{remedy}"
        )


def check_cell_shape(name: str, tensor: Tensor, least: int, most: int) -> None:
    """Refuse anything but cells by pairs, (C, P), with as many cells as an objective reads."""
    shape = tuple(tensor.shape)
    if len(shape) == 2 and least <= shape[0] <= most:
        return
    remedies = {2: " 2 cells are DPO: pass objective=Objective.dpo().",
                3: " 3 cells are rDPO: pass objective=Objective.rdpo()."}  # fmt: skip
    remedy = " Stack one row per cell: chosen, rejected and so on."
    if len(shape) == 2:
        remedy = remedies.get(shape[0], "")
        if least <= shape[1] <= most:
            remedy += " It looks transposed, with one row per pair: pass its .T."
    raise ValueError(
        f"{name} must have shape (C, P) with C in [{least}, {most}] to match objective, "
        f"got {shape}.{remedy}"
    )


def check_chosen_present(num_tokens: Tensor) -> None:
    """Refuse pairs without a chosen answer; ``num_tokens`` must be on the host."""
    empty_pairs = [pair for pair, count in enumerate(num_tokens[0].tolist()) if count <= 0]
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
    hidden_states: Tensor, lm_head_weight: Tensor, swapped: str
) -> tuple[set[torch.dtype], torch.dtype | None]:
    """Return the dtypes that bias and factors may have, and the one that the weight is rounded to.

    The latter is autocast's dtype, or that of the hidden states where the weight has another, or
    None.  Factors may be float32, in which PEFT keeps them beside a half-precision head.
    """
    for name, tensor in (("hidden_states", hidden_states), ("lm_head_weight", lm_head_weight)):
        if tensor.dtype not in _DTYPES:
            raise TypeError(
                f"{name} must be one of {[str(dtype) for dtype in _DTYPES]}, got {tensor.dtype}."
                f"{swapped or _remedy_of_dtype(tensor)}"
            )
    has_float64 = torch.float64 in (hidden_states.dtype, lm_head_weight.dtype)
    # Autocast leaves float64 alone, here as in torch's own operators.
    device_type = hidden_states.device.type
    if torch.is_autocast_enabled(device_type) and not has_float64:
        return {*_HALF_DTYPES, torch.float32}, torch.get_autocast_dtype(device_type)
    if lm_head_weight.dtype != hidden_states.dtype:
        if has_float64:
            raise TypeError(
                f"lm_head_weight must have dtype {hidden_states.dtype} to match hidden_states, "
                f"got {lm_head_weight.dtype}. Cast one of them: float64 mixes with nothing."
            )
        return {*_HALF_DTYPES, torch.float32}, hidden_states.dtype
    return {hidden_states.dtype, torch.float64 if has_float64 else torch.float32}, None


def _remedy_of_dtype(tensor: Tensor) -> str:
    if tensor.dtype in (torch.uint8, torch.int8):
        return " Dequantize a quantized head first."
    return " Take its real part." if tensor.is_complex() else " Call .float()."


def _check_part(
    name: str, part: Tensor, shape: tuple[int, ...], like: Tensor, allowed: set[torch.dtype]
) -> None:
    """Check a bias or a low-rank factor."""
    if part.shape != shape:
        raise ValueError(
            f"{name} must have shape {shape} to match lm_head_weight, got {tuple(part.shape)}. "
            f"{_SHAPES_OF_PARTS}"
        )
    _check_device(name, part, like)
    if part.dtype not in allowed:
        raise TypeError(
            f"{name} must be one of {sorted(map(str, allowed))}, got {part.dtype}. Cast it."
        )


def _check_device(name: str, tensor: Tensor, like: Tensor) -> None:
    remedy = f"Call .to({str(like.device)!r})."
    if tensor.is_meta:
        # Such as the weight of a layer that accelerate has offloaded, outside of its forward.
        remedy = "A meta tensor holds no values: load them onto the device first."
    if tensor.device != like.device:
        raise ValueError(
            f"{name} must be on {like.device} to match hidden_states, got {tensor.device}. {remedy}"
        )
