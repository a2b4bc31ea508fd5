"""Training state in one safetensors file: tensors as tensors, everything else as JSON.

``state_dict()`` returns dicts, lists, tuples, numbers and tensors. ``torch.save`` would pickle
them, and a pickle runs code when it is read.
"""

from __future__ import annotations

import json
import math
import random
from pathlib import Path
from typing import Any

import numpy as np
import torch
from safetensors import safe_open
from safetensors.torch import save_file
from torch import Tensor

from realign.runtime.files import json_text

_PLAIN = (str, int, float, bool, type(None))


def write_state(path: Path, state: Any) -> None:
    """Write a tree of dicts, lists, tuples, strings, numbers, None and tensors.

    Dict keys are strings or integers, and keep their type.

    Raises:
        TypeError: The tree holds another type; the message names the place.
    """
    tensors: dict[str, Tensor] = {}
    tree = _pack(state, "state", tensors, {})
    path.parent.mkdir(parents=True, exist_ok=True)
    save_file(tensors, path, metadata={"tree": json_text(tree, ensure_ascii=True)})


def read_state(path: Path, device: str = "cpu") -> Any:
    """Read a tree that :func:`write_state` wrote, tensors on ``device``, bit for bit."""
    with safe_open(path, framework="pt", device=device) as file:
        return _unpack(json.loads(file.metadata()["tree"]), file)


def _pack(value: Any, where: str, tensors: dict[str, Tensor], names: dict[int, str]) -> Any:
    if isinstance(value, Tensor):
        # a tensor that occurs in many places (code books of 8-bit optimizers) is written once
        if (name := names.get(id(value))) is None:
            name = names[id(value)] = str(len(tensors))
            # safetensors refuses views of one storage
            tensors[name] = value.detach().cpu().clone(memory_format=torch.contiguous_format)
        return {"tensor": name}
    if isinstance(value, dict):
        if bad := [key for key in value if type(key) not in (str, int)]:
            raise TypeError(f"{where} must have keys of str or int to be saved, got {bad[0]!r}.")
        pairs = value.items()
        return {"dict": [[k, _pack(v, f"{where}[{k!r}]", tensors, names)] for k, v in pairs]}
    if isinstance(value, (list, tuple)):
        items = [_pack(item, f"{where}[{i}]", tensors, names) for i, item in enumerate(value)]
        return items if isinstance(value, list) else {"tuple": items}
    if isinstance(value, float) and not math.isfinite(value):
        return {"float": str(value)}  # such as the best loss of a schedule that has seen none
    if isinstance(value, _PLAIN):
        return value
    raise TypeError(
        f"{where} must be made of dicts, lists, tuples, strings, numbers and tensors to be saved "
        f"without pickle, got {type(value).__name__}. Use an optimizer or schedule whose state is."
    )


def _unpack(tree: Any, file: Any) -> Any:
    if isinstance(tree, list):
        return [_unpack(item, file) for item in tree]
    if not isinstance(tree, dict):
        return tree
    ((kind, content),) = tree.items()
    if kind == "tensor":
        return file.get_tensor(content)
    if kind == "float":
        return float(content)
    if kind == "tuple":
        return tuple(_unpack(item, file) for item in content)
    return {key: _unpack(value, file) for key, value in content}


def random_state() -> dict[str, Any]:
    """Return the states of the random generators of Python, NumPy, torch and the accelerator."""
    legacy: Any = np.random.get_state(legacy=False)
    state: dict[str, Any] = {
        "python": random.getstate(),
        "numpy": {**legacy, "state": {**legacy["state"], "key": legacy["state"]["key"].tolist()}},
        "torch": torch.get_rng_state(),
    }
    if torch.accelerator.is_available():
        state["device"] = _device_module().get_rng_state()
    return state


def set_random_state(state: dict[str, Any]) -> None:
    """Set the generators to a state that :func:`random_state` returned."""
    random.setstate(state["python"])
    numpy_state = state["numpy"]
    key = np.array(numpy_state["state"]["key"], dtype=np.uint32)
    np.random.set_state({**numpy_state, "state": {**numpy_state["state"], "key": key}})
    torch.set_rng_state(state["torch"])
    if "device" in state and torch.accelerator.is_available():
        _device_module().set_rng_state(state["device"])


def _device_module() -> Any:
    accelerator = torch.accelerator.current_accelerator()
    assert accelerator is not None
    return torch.get_device_module(accelerator)
