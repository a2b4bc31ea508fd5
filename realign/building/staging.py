"""The stages of a build over their shards: their models, engines and files."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load

from realign.building.acceptance import Acceptance
from realign.building.corpus import Corpus
from realign.building.masking.masker import Masked, MaskRules
from realign.building.models import Asked, LocalModel, Readers, asked_model
from realign.building.retrieval.embedding_store import EmbeddingStore
from realign.building.retrieval.encoders import load_image_processor
from realign.building.retrieval.index import make_index
from realign.building.retrieval.stage import (
    Embed,
    EncoderModel,
    Neighbourhood,
    find_neighbourhood,
    rule_of,
)
from realign.building.stages import Annotate, Induce, Mask, Prepared
from realign.config import BuildConfig
from realign.data.formats.source_row import SourceRow
from realign.errors import RefusedError
from realign.runtime.engine.engine import Engine, fill_shards, make_shards
from realign.runtime.engine.ray_data import require_ray
from realign.runtime.engine.task import Task
from realign.runtime.files import read_jsonl

# memory of a worker's libraries, in addition to the weights
LIBRARY_BYTES = 1 << 30


class ShardLines:
    """Iterable of the lines of a stage's shards, which are read one shard at a time.

    Args:
        shards: Files, with the number of lines of each.
    """

    def __init__(self, shards: Sequence[tuple[Path, int]]) -> None:
        self._shards = shards

    def __iter__(self) -> Iterator[dict[str, Any]]:
        for path, size in self._shards:
            lines = read_jsonl(path)
            if len(lines) != size:
                raise RefusedError(
                    f"{path} must have {size} lines, has {len(lines)}. Delete it and give the same "
                    "command again."
                )
            yield from lines


class Staging:
    """The stages of a build.

    Args:
        config: The build.
        special: The model's special tokens.

    Attributes:
        inducer: Model that refills masks.
        masker: Model that masks; None for the lexicon.
        annotator: Model that generates missing answers, or None.
    """

    def __init__(self, config: BuildConfig, special: tuple[str, ...]) -> None:
        self._config, self._special = config, special
        self.inducer = asked_model(config.inducer, "inducer", config)
        self.masker = (
            asked_model(config.masker, "masker", config) if config.mask == "model" else None
        )
        self.annotator = (
            asked_model(config.annotator, "annotator", config) if config.annotator else None
        )
        self._encoder = EncoderModel.of(config)
        rule_of(config)  # refuses limits that no image can meet
        if config.engine == "ray":
            require_ray()
        if config.index != "exact":
            make_index("flat", torch.eye(2))  # refuses early if FAISS is missing

    def readers(self, model: Path) -> Readers:
        """Return the checks of all models that will read the source outside of servers.

        Args:
            model: Folder of the model to be aligned, which will be trained on the rows.
        """
        asked = (self.inducer, self.masker, self.annotator)
        encoder = self._encoder
        return Readers(
            [model, *(each.folder for each in asked if isinstance(each, LocalModel))],
            [] if encoder.is_own else [load_image_processor(encoder.folder, encoder.name)],
        )

    def identities(self) -> dict[str, Any]:
        """Return everything about the models that the result depends on."""
        roles = {
            "inducer": self.inducer,
            "masker": self.masker,
            "annotator": self.annotator,
            "encoder": self._encoder,
        }
        return {role: each.identity for role, each in roles.items() if each}

    def provenance(self) -> dict[str, Any]:
        """Return the model of each stage, for ``meta``."""
        origins: dict[str, Any] = {
            "source": self._config.source.name,
            "encoder": self._encoder.name,
            "similarity": self._config.similarity,
            "generator": self.inducer.provenance,
        }
        if self.masker:
            origins["masker"] = self.masker.provenance
        if self.annotator:
            origins["annotator"] = self.annotator.provenance
        return origins

    def annotate(self, rows: Sequence[SourceRow]) -> tuple[list[SourceRow], dict[str, str]]:
        """Generate missing answers.

        Returns:
            The rows with their answers, and the reasons why rows have none, by id.
        """
        if self.annotator is None or all(row.answer for row in rows):
            return [*rows], {}
        config = self._config
        task = Annotate(self.annotator, config.annotation_prompt, self._special, config.window)
        lines = self._rows_stage("annotate", "annotated", rows, task, self.annotator)
        answered: list[SourceRow] = []
        problems: dict[str, str] = {}
        for row, line in zip(rows, lines, strict=True):
            if not row.answer:
                row = replace(row, answer=line["answer"], is_annotated=bool(line["answer"]))
            if line["problem"]:
                problems[row.id] = line["problem"]
            answered.append(row)
        return answered, problems

    def mask(self, rows: Sequence[SourceRow], rules: MaskRules) -> list[Masked]:
        """Mask every answer whose row has no rejected answer yet."""
        task = Mask(self.masker, rules, self._config.window)
        lines = self._rows_stage("mask", "masked", rows, task, self.masker)
        return [Masked(line["text"], line["by"]) for line in lines]

    def retrieve(self, corpus: Corpus) -> Neighbourhood:
        """Embed all images, then find the nearest other images of each."""
        config = self._config
        ranges = _ranges(len(corpus), config.shard_size, config.batch_size)
        sizes = {number: len(part) for number, part in ranges.items()}
        digests = [[corpus.facts[i].sha256 for i in part] for part in ranges.values()]
        identity = self._encoder.identity | {"batch_size": config.batch_size}
        store = EmbeddingStore(config.out / "embeddings", identity)
        make_shards(
            "embed",
            store.missing(digests),
            sizes,
            lambda number: [corpus.paths[i] for i in ranges[number]],
            Embed(self._encoder, config.batch_size),
            self.engine(self._encoder),
            lambda number, content: store.write(
                number, load(content)["embeddings"], digests[number]
            ),
        )
        return find_neighbourhood(config, corpus, store, digests)

    def induce(
        self,
        rows: Sequence[SourceRow],
        masked: Sequence[Masked],
        neighbours: Neighbourhood,
        unanswered: Mapping[str, str],
    ) -> ShardLines:
        """Find the retrieved image and the rejected answer of every row; a line is an
        :class:`~realign.building.induction.Outcome`.
        """
        config = self._config
        acceptance = partial(
            Acceptance,
            threshold=config.threshold,
            keep_unmasked=config.keep_unmasked,
            special=self._special,
            min_length_ratio=config.min_length_ratio,
            max_length_ratio=config.max_length_ratio,
        )
        asked = None if all(row.rejected for row in rows) else self.inducer
        task = Induce(asked, config.similarity, acceptance, config.window)

        def prepared(part: range) -> list[Prepared]:
            return [
                Prepared(
                    rows[i],
                    masked[i],
                    neighbours.candidates(rows[i].path),
                    unanswered.get(rows[i].id, ""),
                )
                for i in part
            ]

        return self._stage("induce", "shards", len(rows), prepared, task, asked)

    def _rows_stage(
        self, stage: str, folder: str, rows: Sequence[SourceRow], task: Task, asked: Asked | None
    ) -> ShardLines:
        return self._stage(
            stage, folder, len(rows), lambda part: [rows[i] for i in part], task, asked
        )

    def _stage(
        self,
        stage: str,
        folder: str,
        num_rows: int,
        item: Callable[[range], Sequence[Any]],
        task: Task,
        asked: Asked | None,
    ) -> ShardLines:
        """Return the lines of all shards of a stage over rows, in order of the rows."""
        ranges = self.shards(num_rows)
        paths = _paths(self._config.out / folder, ranges, "jsonl")
        sizes = {number: len(part) for number, part in ranges.items()}
        engine = self.engine(asked)
        fill_shards(stage, paths, sizes, lambda number: item(ranges[number]), task, engine)
        return ShardLines([(paths[number], sizes[number]) for number in ranges])

    def shards(self, num_rows: int) -> dict[int, range]:
        """Return the shards of a stage over rows: the range of rows by number."""
        return _ranges(num_rows, self._config.shard_size, self._config.window)

    def engine(self, asked: Any) -> Engine:
        """Return the engine of a stage. Local models run in parallel; a server is asked by one
        process, which holds the journal.
        """
        config = self._config
        folder = getattr(asked, "folder", None)
        if folder is None:
            return Engine(workers=1, threads=config.threads)
        weights = sum(path.stat().st_size for path in folder.glob("*.safetensors"))
        return Engine(config.engine, config.workers, config.threads, LIBRARY_BYTES + 2 * weights)


def _ranges(count: int, shard_size: int, unit: int) -> dict[int, range]:
    """Return the range of each shard by its number: whole units, the last shard shorter."""
    size = -(-shard_size // unit) * unit
    return {
        number: range(start, min(start + size, count))
        for number, start in enumerate(range(0, count, size))
    }


def _paths(folder: Path, ranges: Mapping[int, range], suffix: str) -> dict[int, Path]:
    return {number: folder / f"{number:05d}.{suffix}" for number in ranges}
