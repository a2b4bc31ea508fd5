"""Images that no row of a micro-batch shows, encoded with weight 0.

A rank whose pairs are all text would not call the vision tower and the projector. Where they are
sharded (FSDP, ZeRO-3) the other ranks would wait for its part of their weights for ever, and
where they train (DDP) for its gradient.
"""

from __future__ import annotations

import inspect
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn


@contextmanager
def unseen_images_encoded(body: nn.Module, images: Mapping[str, Tensor]) -> Iterator[None]:
    """Within it, ``body`` encodes ``images`` right after it has embedded its tokens, where it
    encodes those that its rows show: sharded weights must be gathered in one order on all ranks.
    The embeddings do not change; the gradient of what encodes is there, and 0.

    Args:
        body: A model with ``get_input_embeddings`` and ``get_image_features``.
        images: What the processor made of them, such as ``pixel_values``.
    """
    encode: Any = body.get_image_features
    taken = inspect.signature(encode).parameters
    inputs = {name: value for name, value in images.items() if name in taken}

    def add_nothing(module: nn.Module, args: Any, embeddings: Tensor) -> Tensor:
        output = encode(**inputs)
        total = torch.stack([part.float().mean() for part in _features(output)]).sum()
        return embeddings + (0.0 * total).to(embeddings)

    embedding: Any = body.get_input_embeddings()  # type: ignore[operator]
    hook = embedding.register_forward_hook(add_nothing)
    try:
        yield
    finally:
        hook.remove()


def _features(output: Any) -> Iterator[Tensor]:
    """Everything that the model would put into its layers."""
    # Qwen3-VL has some for deeper layers
    for features in (output.pooler_output, *(getattr(output, "deepstack_features", None) or ())):
        yield from (features,) if isinstance(features, Tensor) else features
