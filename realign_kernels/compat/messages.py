"""Errors of the head, reworded with the argument names of another signature."""

from __future__ import annotations

import re
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from collections.abc import Callable, Mapping


def call_with_names(
    function: Callable[..., Any], names: Mapping[str, str], *args: Any, **options: Any
) -> Any:
    """Call a function of the head, and rename the arguments in the messages of its errors.

    Args:
        function: The function.
        names: Map from the name of an argument here to the name that the caller knows.
        args: Positional arguments of the function.
        options: Keyword arguments of the function.
    """
    try:
        return function(*args, **options)
    except (TypeError, ValueError, RuntimeError) as error:
        # In "the labels" the word is no argument.
        pattern = rf"(?<!the )\b({'|'.join(names)})\b"
        message = re.sub(pattern, lambda found: names[found[0]], str(error))
        if message == str(error):
            raise
        raise type(error)(message) from error
