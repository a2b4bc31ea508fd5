"""Encoding of every distinct set of images of a micro-batch once, however many rows show it."""

from __future__ import annotations

import inspect
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn


@dataclass(frozen=True, slots=True)
class ImageUse:
    """Use of images by the rows of a batch.

    Attributes:
        tokens: Image tokens of every set of images whose pixels are in the batch.
        counts: Number of images of every set.
        rows: Index of the set that each row with images shows, in the order of the rows.
    """

    tokens: tuple[int, ...]
    counts: tuple[int, ...]
    rows: tuple[int, ...]

    @property
    def is_once_each(self) -> bool:
        """Return whether the features are already those of the rows, in their order."""
        return self.rows == tuple(range(len(self.tokens)))


@contextmanager
def image_features_by_row(body: nn.Module, images: ImageUse) -> Iterator[None]:
    """Let ``body.get_image_features`` encode each set of images once within the block.

    Args:
        body: A model that calls its own ``get_image_features`` and puts the features in place of
            the image tokens, in order.
        images: The use of the sets.
    """
    if images.is_once_each:
        yield
        return
    encode: Any = body.get_image_features

    def encode_once(*args: Any, **kwargs: Any) -> Any:
        output = encode(*args, **kwargs)
        output.pooler_output = _repeat(output.pooler_output, images)
        deepstack = getattr(output, "deepstack_features", None)  # Qwen3-VL adds them to layers
        if deepstack is not None:
            output.deepstack_features = [_repeat(layer, images) for layer in deepstack]
        return output

    body.get_image_features = encode_once  # type: ignore[assignment]
    try:
        yield
    finally:
        del body.get_image_features


def _repeat(features: Tensor | Sequence[Tensor], images: ImageUse) -> Tensor | list[Tensor]:
    """Return the features of every row's tokens, in the container that they came in."""
    if isinstance(features, Tensor):
        flat = features.reshape(-1, features.shape[-1])
    else:
        flat = torch.cat([part.reshape(-1, part.shape[-1]) for part in features])
    if len(flat) != sum(images.tokens):
        raise ValueError(
            f"images must have one feature per token, got {len(flat)} features for "
            f"{sum(images.tokens)} tokens."
        )
    sets = flat.split(list(images.tokens))
    repeated = torch.cat([sets[index] for index in images.rows])
    if isinstance(features, Tensor):
        return repeated.reshape(-1, *features.shape[1:])
    return [repeated]


@contextmanager
def unseen_images_encoded(body: nn.Module, images: Mapping[str, Tensor]) -> Iterator[None]:
    """Let ``body`` encode ``images`` within the block right after it has embedded its tokens, where
    it encodes those that its rows show: sharded weights must be gathered in one order on all ranks.
    The embeddings do not change; the encoder gets a gradient of 0.

    Args:
        body: A model with ``get_input_embeddings`` and ``get_image_features``.
        images: The processor's tensors, such as ``pixel_values``.
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
    """Yield all features that the model would put into its layers."""
    # Qwen3-VL has some for deeper layers
    for features in (output.pooler_output, *(getattr(output, "deepstack_features", None) or ())):
        yield from (features,) if isinstance(features, Tensor) else features
