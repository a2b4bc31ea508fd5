"""Digests of exactly what a model is given for a row. They do not depend on how rows are batched,
packed or padded.
"""

from __future__ import annotations

import hashlib
from collections.abc import Mapping, Sequence

import numpy as np
import torch
from torch import Tensor

DIGEST_BYTES = 16


def token_digest(prompt_ids: Sequence[int] | Tensor, scored_ids: Sequence[int]) -> bytes:
    """Return 16 bytes that stand for the token ids of one cell and for which of them are scored.

    Args:
        prompt_ids: Everything before the answer, image tokens included, without padding.
        scored_ids: The answer and its end of turn.
    """
    digest = hashlib.blake2b(digest_size=DIGEST_BYTES)
    for ids in (prompt_ids, scored_ids):
        array = np.asarray(ids, dtype="<i4")
        digest.update(len(array).to_bytes(8, "little"))
        digest.update(array.tobytes())
    return digest.digest()


def pixel_digest(images: Mapping[str, Tensor]) -> bytes:
    """Return 16 bytes that stand for what a processor made of images: names, dtypes, shapes and
    values of its tensors.
    """
    digest = hashlib.blake2b(digest_size=DIGEST_BYTES)
    for name in sorted(images):
        tensor = images[name].detach().cpu().contiguous()
        what = f"{name} {tensor.dtype} {tuple(tensor.shape)}".encode()
        digest.update(len(what).to_bytes(8, "little"))
        digest.update(what)
        digest.update(tensor.reshape(-1).view(torch.uint8).numpy().data)
    return digest.digest()
