"""Retrieval as stages of a build: embed ranges of the corpus in workers, then find the neighbours
of ranges of images here.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from safetensors.numpy import load, save

from realign.build.corpus import Corpus
from realign.build.induction import Candidate
from realign.config import BuildConfig
from realign.modeling import choose_dtype, load_model, load_processor, model_identity, resolve_model
from realign.retrieval.embed import embed_shard
from realign.retrieval.encoders import ClipEncoder, Encoder, VisionPathEncoder
from realign.retrieval.index import Index, make_index
from realign.retrieval.neighbours import Rule, find_neighbours

# names of BuildConfig.encoder
OWN_ENCODER = "model"


@dataclass(frozen=True)
class EncoderModel:
    """An encoder that a worker loads.

    Attributes:
        name: For the provenance of a row.
        folder: The model.
        is_own: Whether it is the vision path of the VLM.
        dtype: Of the weights.
    """

    name: str
    folder: Path
    is_own: bool
    dtype: torch.dtype

    @classmethod
    def of(cls, config: BuildConfig) -> EncoderModel:
        """What the configuration names."""
        is_own = config.encoder == OWN_ENCODER
        folder = resolve_model(config.model if is_own else config.encoder)
        given = folder.name if Path(config.encoder).is_dir() else config.encoder
        name = VisionPathEncoder.name if is_own else given
        return cls(name, folder, is_own, choose_dtype(config.dtype))

    @property
    def identity(self) -> dict[str, Any]:
        """Everything that its vectors depend on besides images and batches."""
        return {
            "model": model_identity(self.folder),
            "dtype": str(self.dtype),
            "is_own": self.is_own,
        }

    def open(self) -> Encoder:
        """Load it, onto the GPU where there is one."""
        device = "cuda" if torch.cuda.is_available() else "cpu"
        if not self.is_own:
            return ClipEncoder.load(str(self.folder), self.dtype, device)
        model = load_model(self.folder, self.dtype, scoring=False).to(device).eval()
        return VisionPathEncoder(model, load_processor(self.folder), model_identity(self.folder))


@dataclass(frozen=True)
class Embed:
    """Embeds a range of images: float32 rows of length 1 as safetensors."""

    encoder: EncoderModel
    batch_size: int

    @contextmanager
    def open(self) -> Iterator[Callable[[Sequence[Path]], bytes]]:
        """Load the encoder."""
        encoder = self.encoder.open()
        yield lambda paths: save(
            {"embeddings": embed_shard(encoder, paths, self.batch_size).numpy()}
        )


@dataclass(frozen=True)
class FindNeighbours:
    """Finds the candidates of a range of images: rows of ``indices``, -1 where there are no more,
    ``cosines``, and counts of what was passed over in the metadata.
    """

    embeddings: Callable[[], torch.Tensor]
    index: str
    corpus: Corpus
    rule: Rule

    @contextmanager
    def open(self) -> Iterator[Callable[[range], bytes]]:
        """Read the embeddings and make the index."""
        index: Index = make_index(self.index, self.embeddings())
        digests, hashes = self.corpus.digests, self.corpus.perceptual_hashes

        def work(images: range) -> bytes:
            found = find_neighbours(index, images, digests, self.rule, hashes)
            counts = found.excluded + found.short
            return save(
                {
                    "indices": found.indices.astype(np.int64),
                    "cosines": found.cosines.astype(np.float32),
                    "counts": np.array([counts[reason] for reason in REASONS], dtype=np.int64),
                }
            )

        yield work


# why an image was no candidate, and why a query has fewer than it may
REASONS = (
    *("byte_duplicate", "near_duplicate", "above_max_cosine"),
    *("below_min_cosine", "no_more_images"),
)


def rule_of(config: BuildConfig) -> Rule:
    """What is a candidate."""
    return Rule(
        k=config.top_k,
        min_cosine=config.min_cosine,
        max_cosine=config.max_cosine,
        max_hamming=config.max_hamming,
    )


@dataclass(frozen=True)
class Neighbourhood:
    """The candidates of every image of a corpus."""

    corpus: Corpus
    indices: NDArray[np.int64]
    cosines: NDArray[np.float32]
    excluded: dict[str, int]

    @classmethod
    def read(cls, corpus: Corpus, paths: Sequence[Path]) -> Neighbourhood:
        """Read the shards of :class:`FindNeighbours`."""
        shards = [load(path.read_bytes()) for path in paths]
        counts: Counter[str] = Counter()
        for shard in shards:
            counts.update(dict(zip(REASONS, shard["counts"].tolist(), strict=True)))
        return cls(
            corpus,
            np.concatenate([shard["indices"] for shard in shards]),
            np.concatenate([shard["cosines"] for shard in shards]),
            {reason: count for reason, count in counts.items() if count},
        )

    def candidates(self, image: Path) -> list[Candidate]:
        """The candidates of an image file, best first."""
        place = self.corpus.position[image]
        found = zip(self.indices[place].tolist(), self.cosines[place].tolist(), strict=True)
        return [
            Candidate(self.corpus.names[index], self.corpus.paths[index], rank, cosine)
            for rank, (index, cosine) in enumerate(found, start=1)
            if index >= 0
        ]
