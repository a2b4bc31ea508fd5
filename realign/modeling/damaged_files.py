"""Refusal of model files that another library cannot load."""

from __future__ import annotations

import errno
from collections.abc import Iterator
from contextlib import contextmanager

from safetensors import SafetensorError

from realign.errors import RefusedError
from realign.modeling.folder import first_line


@contextmanager
def refuse_damaged_files(model: str) -> Iterator[None]:
    """Turn an error of a library that loads a model inside the block into a refusal.

    Args:
        model: The model, for the message: ``encoder openai/clip-vit-large-patch14``.
    """
    try:
        yield
    except RefusedError:
        raise
    except (OSError, SafetensorError, ValueError, KeyError, TypeError, AttributeError) as error:
        if isinstance(error, OSError) and error.errno not in (None, errno.ENOENT):
            raise  # an error of this machine, such as too many open files
        raise RefusedError(
            f"{model} must hold whole files that its library loads, got {type(error).__name__}: "
            f"{first_line(error)}. If a file is damaged, download it again."
        ) from error
