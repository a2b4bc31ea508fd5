"""The schema of an operator of torch, from the named tuples of its arguments."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, get_type_hints

import torch
from torch import Tensor
from torch._library.custom_ops import CustomOpDef

# Types as a schema spells them.  Without a schema, torch.library.custom_op reads a signature, which
# every fake would have to repeat.
_TYPES: dict[Any, str] = {
    Tensor: "Tensor",
    Tensor | None: "Tensor?",
    list[Tensor]: "Tensor[]",
    bool: "bool",
    int: "int",
    float: "float",
    str: "str",
    str | None: "str?",
    torch.dtype: "ScalarType",
    torch.dtype | None: "ScalarType?",
    list[bool]: "bool[]",
    list[int]: "SymInt[]",
    list[float]: "float[]",
}


def operator(
    name: str, *arguments: type, returns: type | str
) -> Callable[[Callable[..., Any]], CustomOpDef]:
    """Return a decorator that registers a function as an operator of torch. The arguments of the
    operator are the fields of ``arguments``.

    ``returns`` is a named tuple of tensors, or a type as a schema spells it.
    """
    fields = [
        f"{_TYPES[kind]} {field}"
        for group in arguments
        for field, kind in get_type_hints(group).items()
    ]
    if isinstance(returns, type):
        returns = f"({', '.join(['Tensor'] * len(get_type_hints(returns)))})"
    schema = f"({', '.join(fields)}) -> {returns}"
    return torch.library.custom_op(f"realign::{name}", mutates_args=(), schema=schema)
