"""Retrieval as stages of a build: workers embed ranges of the corpus, then this process finds the
neighbours of ranges of images.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import torch
from safetensors.numpy import save

from realign.building.corpus import Corpus
from realign.building.induction import Candidate
from realign.building.retrieval.embedding_store import EmbeddingStore
from realign.building.retrieval.encoders import (
    ClipEncoder,
    Encoder,
    VisionPathEncoder,
    embed_shard,
    load_image_processor,
)
from realign.building.retrieval.index import make_index
from realign.building.retrieval.neighbour_search import NeighbourSearch
from realign.building.retrieval.neighbour_store import NeighbourStore
from realign.building.retrieval.neighbours import Neighbours, Rule
from realign.building.retrieval.sealed_arrays import array_sha256
from realign.config import BuildConfig
from realign.errors import RefusedError
from realign.modeling.adapter_folder import check_adapter
from realign.modeling.folder import is_adapter, model_identity, resolve_model
from realign.modeling.loading import choose_dtype, load_model
from realign.modeling.processors import load_processor
from realign.runtime.engine.engine import Engine, make_shards

# names of BuildConfig.encoder
OWN_ENCODER = "model"
# smallest number of images of a search shard, because each shard reads the whole corpus
SEARCHED = 4096


@dataclass(frozen=True)
class EncoderModel:
    """An encoder that a worker loads.

    Attributes:
        name: Name for the provenance of rows.
        folder: Folder of the model.
        is_own: Whether it is the vision path of the VLM.
        dtype: Dtype of the weights.
    """

    name: str
    folder: Path
    is_own: bool
    dtype: torch.dtype

    @classmethod
    def of(cls, config: BuildConfig) -> EncoderModel:
        """Return the encoder that the configuration names.

        Raises:
            RefusedError: The adapter does not fit its base, or the encoder is an adapter.
        """
        is_own = config.encoder == OWN_ENCODER
        folder = resolve_model(config.model) if is_own else resolve_model(config.encoder, "encoder")
        if is_own:
            check_adapter(folder)
        elif is_adapter(folder):
            raise RefusedError(
                f"encoder must be a whole model, got {folder}, an adapter. Merge it into its base "
                "with peft, save both with the base's image processor, and give that folder."
            )
        given = folder.name if Path(config.encoder).is_dir() else config.encoder
        name = VisionPathEncoder.name if is_own else given
        return cls(name, folder, is_own, choose_dtype(config.dtype))

    @cached_property
    def identity(self) -> dict[str, Any]:
        """Everything that the vectors depend on besides images and batches, determined without
        loading the weights.
        """
        if self.is_own:
            pooling, images = VisionPathEncoder.pooling, load_processor(self.folder).image_processor
        else:
            pooling, images = ClipEncoder.pooling, load_image_processor(self.folder, self.name)
        return {
            "model": model_identity(self.folder),
            "dtype": str(self.dtype),
            "pooling": pooling,
            # processors that scale with different libraries give different pixels
            "processor": type(images).__name__,
        }

    def open(self) -> Encoder:
        """Load the encoder, onto the GPU if there is one."""
        device = "cuda" if torch.cuda.is_available() else "cpu"
        if not self.is_own:
            return ClipEncoder.load(str(self.folder), self.dtype, device)
        model = load_model(self.folder, self.dtype, scoring=False).to(device).eval()
        return VisionPathEncoder(model, load_processor(self.folder))


@dataclass(frozen=True)
class Embed:
    """Task that embeds a range of images: float32 rows of length 1 as safetensors."""

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
    """Task that finds the neighbours of a range of images: the content of a file of ``store``."""

    embeddings: Callable[[], torch.Tensor]
    index: str
    corpus: Corpus
    rule: Rule
    store: NeighbourStore

    @contextmanager
    def open(self) -> Iterator[Callable[[range], bytes]]:
        """Read the embeddings and make the index."""
        index = make_index(self.index, self.embeddings())
        corpus = self.corpus
        search = NeighbourSearch(index, corpus.digests, self.rule, corpus.perceptual_hashes)
        yield lambda images: self.store.encode(images, search.find(images))


def rule_of(config: BuildConfig) -> Rule:
    """Return the rule for candidates."""
    return Rule(
        k=config.top_k,
        min_cosine=config.min_cosine,
        max_cosine=config.max_cosine,
        max_hamming=config.max_hamming,
    )


def find_neighbourhood(
    config: BuildConfig,
    corpus: Corpus,
    embeddings: EmbeddingStore,
    digests: Sequence[Sequence[str]],
) -> Neighbourhood:
    """Find the neighbours of every image of a corpus.

    Args:
        config: The build.
        corpus: The images.
        embeddings: Their vectors, all of which are computed.
        digests: Content hashes of the images of every shard of ``embeddings``.
    """
    rule = rule_of(config)
    origin = {
        "rule": asdict(rule),
        "index": config.index,
        "embeddings": embeddings.content(digests),
        "perceptual_hashes": array_sha256(corpus.perceptual_hashes),
    }
    size = max(config.shard_size, SEARCHED)
    ranges = [range(start, min(start + size, len(corpus))) for start in range(0, len(corpus), size)]
    store = NeighbourStore(config.out / "neighbours", origin, ranges)
    make_shards(
        "retrieve",
        store.missing(),
        {number: len(images) for number, images in enumerate(ranges)},
        lambda number: ranges[number],
        FindNeighbours(lambda: embeddings.read(digests), config.index, corpus, rule, store),
        # one search at a time, on all cores
        Engine(workers=1, threads=torch.get_num_threads()),
        store.write,
    )
    return Neighbourhood(corpus, store.read())


@dataclass(frozen=True)
class Neighbourhood:
    """The candidates of every image of a corpus."""

    corpus: Corpus
    found: Neighbours

    @property
    def excluded(self) -> dict[str, int]:
        """Return the number of images that are not candidates or have too few, by reason."""
        return dict(self.found.excluded + self.found.short)

    def candidates(self, image: Path) -> list[Candidate]:
        """Return the candidates of an image file, best first."""
        place = self.corpus.position[image]
        found = zip(
            self.found.indices[place].tolist(), self.found.cosines[place].tolist(), strict=True
        )
        return [
            Candidate(self.corpus.names[index], self.corpus.paths[index], rank, cosine)
            for rank, (index, cosine) in enumerate(found, start=1)
            if index >= 0
        ]
