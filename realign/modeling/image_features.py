"""Encoding of images once per micro-batch, however many rows show them."""

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
    """Assignment of sets of images to the rows of a batch that show them.

    Attributes:
        tokens: Number of image tokens of every set whose pixels are in the batch.
        counts: Number of images of every set.
        rows: Index of the set that each row with images shows, in the order of the rows.
    """

    tokens: tuple[int, ...]
    counts: tuple[int, ...]
    rows: tuple[int, ...]

    @property
    def is_once_each(self) -> bool:
        """Return whether every row shows a set of its own, in order."""
        return self.rows == tuple(range(len(self.tokens)))


@contextmanager
def image_features_by_row(body: nn.Module, images: ImageUse) -> Iterator[None]:
    """Within the block, let ``body.get_image_features`` encode each set of images once, and return
    the features of every row that shows it.

    Args:
        body: A model that calls its own ``get_image_features`` and replaces image tokens by the
            features, in order.
        images: The sets that the rows show.
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
    """Return the features of every row's tokens, in the same container as ``features``."""
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
    """Within the block, let ``body`` encode ``images`` right after embedding its tokens, where
    ranks with images do: sharded weights are gathered in the same order on all ranks. The
    embeddings do not change, and the encoder gets a gradient of 0.

    Args:
        body: A model with ``get_input_embeddings`` and ``get_image_features``.
        images: The processor's tensors, such as ``pixel_values``.
    """
    encode: Any = body.get_image_features
    accepted = inspect.signature(encode).parameters
    inputs = {name: value for name, value in images.items() if name in accepted}

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
    """Yield all features that the model would use."""
    # Qwen3-VL has some for deeper layers
    for features in (output.pooler_output, *(getattr(output, "deepstack_features", None) or ())):
        yield from (features,) if isinstance(features, Tensor) else features
