"""Embeddings on disk: one safetensors file per shard, which identifies its encoder and images.

    <folder>/00003.safetensors   embeddings (images of the shard, D), float32 or float16
        encoder   hash of everything that the vectors depend on besides the images
        images    hash of the digests of the shard's images, in order

float16 halves the memory and changes a cosine by about 1e-5.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path

import torch
from safetensors import SafetensorError
from torch import Tensor

from realign.building.retrieval.sealed_arrays import encode_arrays, load_arrays, read_origin
from realign.errors import RefusedError
from realign.runtime.files import canonical_json, content_sha256, replacing

NAME = "embeddings"
DIFFERENCES = {"encoder": "it is of another encoder", "images": "it is of other images"}


class EmbeddingStore:
    """The shards of one encoder and one corpus.

    Args:
        folder: Folder of the shards, which need not exist.
        identity: Everything that the vectors depend on besides the images.
        dtype: Dtype of the stored vectors, float32 or float16.
    """

    def __init__(
        self, folder: Path, identity: Mapping[str, object], dtype: torch.dtype = torch.float32
    ) -> None:
        self.folder = folder
        self.dtype = dtype
        self.encoder = content_sha256(canonical_json({**identity, "stored": str(dtype)}))

    def path(self, number: int) -> Path:
        """Return the file of a shard."""
        return self.folder / f"{number:05d}.safetensors"

    def missing(self, digest_shards: Sequence[Sequence[str]]) -> list[int]:
        """Return the numbers of the shards to compute: those that are absent, damaged, or of
        another encoder or other images.

        Args:
            digest_shards: Content hashes of each shard's images, in order.
        """
        return [
            number
            for number, digests in enumerate(digest_shards)
            if isinstance(self._load(number, digests), str)
        ]

    def write(self, number: int, embeddings: Tensor, digests: Sequence[str]) -> None:
        """Write a shard, whole or not at all.

        Args:
            number: Number of the shard.
            embeddings: One row per image, shape ``(len(digests), D)``.
            digests: Content hashes of the shard's images, in order.
        Raises:
            ValueError: There is not one row per image, or a number is not finite.
        """
        if embeddings.ndim != 2 or len(embeddings) != len(digests):
            raise ValueError(
                f"embeddings must be one row for each of {len(digests)} images, got "
                f"{tuple(embeddings.shape)}."
            )
        if not embeddings.isfinite().all():
            raise ValueError(f"embeddings must be finite, shard {number} has others.")
        stored = embeddings.detach().cpu().to(self.dtype).contiguous()
        content = encode_arrays({NAME: stored.numpy()}, self._origin(digests))
        with replacing(self.path(number)) as temporary:
            temporary.write_bytes(content)

    def read(self, digest_shards: Sequence[Sequence[str]]) -> Tensor:
        """Return all vectors, shape ``(images, D)``, in the stored dtype. Beside them, one shard at
        a time is in memory.

        Raises:
            RefusedError: A shard is missing, damaged, or of another encoder or other images.
        """
        vectors, start = torch.empty(0, 0, dtype=self.dtype), 0
        for number, digests in enumerate(digest_shards):
            shard = self._load(number, digests)
            if isinstance(shard, str):
                raise RefusedError(
                    f"{self.path(number)} must hold the vectors of shard {number}, but {shard}. "
                    "Embed it again."
                )
            if not number:
                images = sum(map(len, digest_shards))
                vectors = torch.empty(images, shard.shape[1], dtype=self.dtype)
            vectors[start : start + len(shard)] = shard
            start += len(shard)
        return vectors

    def content(self, digest_shards: Sequence[Sequence[str]]) -> str:
        """Return one hash of the contents of all shards, from their headers alone.

        Raises:
            RefusedError: A shard is missing or damaged.
        """
        parts = []
        for number in range(len(digest_shards)):
            try:
                parts.append(canonical_json(read_origin(self.path(number))))
            except (SafetensorError, OSError, KeyError, ValueError, TypeError) as error:
                raise RefusedError(
                    f"{self.path(number)} must hold the vectors of shard {number} ({error}). "
                    "Delete it and run again."
                ) from None
        return content_sha256(*parts)

    def _load(self, number: int, digests: Sequence[str]) -> Tensor | str:
        """Return a shard as it was written, or what is wrong with it."""
        found = load_arrays(self.path(number), self._origin(digests), DIFFERENCES)
        return found if isinstance(found, str) else torch.from_numpy(found[NAME])

    def _origin(self, digests: Sequence[str]) -> dict[str, str]:
        return {"encoder": self.encoder, "images": content_sha256(*digests)}
