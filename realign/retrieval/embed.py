"""One shard of embeddings: decode, encode, in batches that the shard's own images form."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import torch
from torch import Tensor

from realign.images import decode_image
from realign.retrieval.encoders import Encoder


def embed_shard(encoder: Encoder, paths: Sequence[Path], batch_size: int) -> Tensor:
    """Return the vectors of one shard's images, in order.

    Args:
        encoder: What makes them.
        paths: Checked image files.
        batch_size: Images encoded together.
    Returns:
        Shape ``(len(paths), D)``, float32.
    Raises:
        RefusedError: A file is no image, or the encoder refuses.
    """
    parts = []
    for start in range(0, len(paths), batch_size):
        batch = paths[start : start + batch_size]
        parts.append(encoder([decode_image(path.read_bytes(), path.name) for path in batch]))
    return torch.cat(parts)
