"""Which images look alike: embeddings from the VLM's own vision path, exact cosine top-k."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from safetensors import safe_open
from safetensors.torch import save_file
from torch import Tensor, nn

from realign.build.corpus import Corpus
from realign.files import content_sha256, replacing
from realign.images import decode_image
from realign.progress import Progress

# rows of the similarity matrix held at once
SEARCH_ROWS = 1024


@torch.inference_mode()
def embed_images(
    model: nn.Module, processor: Any, corpus: Corpus, path: Path, batch_size: int
) -> Tensor:
    """Embed a corpus: vision tower and projector, mean over image tokens, length 1. Kept in
    ``path``.

    Returns:
        Shape ``(images, D)``, float32, on the CPU.
    """
    digest = content_sha256(*corpus.digests)
    if path.is_file():
        with safe_open(path, framework="pt") as file:
            if file.metadata()["corpus"] == digest:
                return file.get_tensor("embeddings")
    vlm: Any = model
    chunks = []
    with Progress("embed", len(corpus.paths)) as progress:
        for start in range(0, len(corpus.paths), batch_size):
            paths = corpus.paths[start : start + batch_size]
            images = [decode_image(image.read_bytes(), image.name) for image in paths]
            inputs = processor.image_processor(images=images, return_tensors="pt").to(vlm.device)
            features = vlm.get_image_features(**inputs).pooler_output  # one (tokens, D) an image
            chunks.append(
                torch.stack(
                    [F.normalize(tokens.float().mean(0), dim=0) for tokens in features]
                ).cpu()
            )
            progress.advance(len(paths))
    embeddings = torch.cat(chunks)
    with replacing(path) as temporary:
        save_file({"embeddings": embeddings}, temporary, metadata={"corpus": digest})
    return embeddings


def nearest(embeddings: Tensor, queries: Sequence[int], k: int) -> tuple[Tensor, Tensor]:
    """The ``k`` most similar other images of each query, best first; equal cosines in corpus order.

    Args:
        embeddings: Rows of length 1, shape ``(images, D)``.
        queries: Row numbers.
        k: How many; fewer where the corpus has fewer.
    Returns:
        cosines, indices: Shape ``(len(queries), min(k, images - 1))``.
    """
    k = min(k, len(embeddings) - 1)
    cosines, indices = [], []
    for start in range(0, len(queries), SEARCH_ROWS):
        rows = torch.tensor(queries[start : start + SEARCH_ROWS])
        similarity = embeddings[rows] @ embeddings.T
        similarity[torch.arange(len(rows)), rows] = -torch.inf
        best = similarity.sort(dim=1, descending=True, stable=True)
        cosines.append(best.values[:, :k])
        indices.append(best.indices[:, :k])
    return torch.cat(cosines), torch.cat(indices)
