"""The verb ``realign build``: mask, retrieve, induce, filter; a shard a group of records, resumed
after a kill.

    <out>/build.json           what the result depends on
    <out>/embeddings.safetensors
    <out>/shards/00003.jsonl   outcomes of one group, accepted or not, with reasons
    <out>/dataset.parquet      the accepted pairs
    <out>/funnel.json          how many rows got how far, and why not further
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

from realign.build.acceptance import Acceptance
from realign.build.corpus import Corpus
from realign.build.induction import Candidate, induce
from realign.build.lengths import PromptLength, position_limit
from realign.build.masker import Fits, MaskRules, mask_rows
from realign.build.masking import Lexicon
from realign.build.retrieval import embed_images, nearest
from realign.build.row import SourceRow
from realign.build.similarity import load_similarity
from realign.build.sources.strict import read_every_row as read_source
from realign.collate import Renderer
from realign.config import BuildConfig
from realign.errors import RefusedError
from realign.files import file_sha256, read_jsonl, write_json, write_jsonl
from realign.generate.transformers_generator import TransformersGenerator
from realign.modeling import choose_dtype, load_processor, model_identity, resolve_model
from realign.parquet import write_parquet
from realign.progress import Progress
from realign.records import Record
from realign.run_folder import check_out, claim, is_claimed

ENGLISH_LEXICON = Path(__file__).with_name("lexicon.yaml")


def build(config: BuildConfig) -> Path:
    """Build a dual-preference dataset and return its parquet file. The same call after a kill
    continues.

    Raises:
        RefusedError: A bad source row, an output folder that holds another run, or no row that
            gave a pair.
    """
    check_out(config.out)
    folder = resolve_model(config.model)
    special = tuple(Renderer(load_processor(folder)).placeholders())
    rows = read_source(config.source, config.images, special)
    corpus = Corpus.of(rows)
    if len(corpus.names) < 2:
        raise RefusedError(
            f"source must show at least 2 different images to retrieve from, got "
            f"{len(corpus.names)}. Add rows of other images; equal files are one image."
        )
    lexicon_path = config.lexicon or ENGLISH_LEXICON
    rules = MaskRules(config.mask, Lexicon.load(lexicon_path), config.mask_rates, config.seed)
    acceptance = Acceptance(
        load_similarity(config.similarity), config.threshold, config.keep_unmasked, special
    )
    rules.lexicon.check_rates(config.mask_rates)
    what = {
        "config": config.model_dump(
            mode="json",
            # none is the model's own limit, which its files say
            exclude={"out", "source", "images", "model", "lexicon"}
            | ({"max_length"} if config.max_length is None else set()),
        ),
        "source": file_sha256(config.source),
        "images": corpus.digests,
        "lexicon": file_sha256(lexicon_path),
        "model": model_identity(folder, generates=True),
        "dtype": str(choose_dtype(config.dtype)),
    }
    dataset = config.out / "dataset.parquet"
    labels = {"images": corpus.names}
    if is_claimed(config.out, "build", what, labels) and dataset.is_file():
        return dataset
    generator = TransformersGenerator.load(
        folder, choose_dtype(config.dtype), config.max_new_tokens, config.batch_size
    )
    limit = config.max_length or position_limit(generator.model.config)
    fits = PromptLength(generator.processor, limit).fits
    claim(config.out, "build", what, labels)
    candidates = _candidates(rows, corpus, generator, config)
    outcomes: list[dict[str, Any]] = []
    with Progress("build", len(rows)) as progress:
        # groups are formed by position in the source, so a resumed run makes the batches that it
        # would have made
        for number, start in enumerate(range(0, len(rows), config.group_size)):
            shard = config.out / "shards" / f"{number:05d}.jsonl"
            group = slice(start, start + config.group_size)
            if not shard.is_file():
                write_jsonl(
                    shard,
                    _run_group(rows[group], candidates[group], rules, acceptance, generator, fits),
                )
            outcomes += read_jsonl(shard)
            progress.advance(len(rows[group]))
    counts = funnel(outcomes)
    write_json(config.out / "funnel.json", counts)
    if not counts["accepted"]:
        raise RefusedError(
            f"source must give at least one pair, got none from {counts['rows']} rows: "
            f"{counts['dropped']}. See {config.out / 'funnel.json'}."
        )
    write_parquet(_records(rows, outcomes, corpus, config), dataset)
    return dataset


def _candidates(
    rows: Sequence[SourceRow], corpus: Corpus, generator: TransformersGenerator, config: BuildConfig
) -> list[list[Candidate]]:
    """The nearest images of every row, itself and its byte duplicates excluded."""
    path = config.out / "embeddings.safetensors"
    embeddings = embed_images(generator.model, generator.processor, corpus, path, config.batch_size)
    position = {digest: i for i, digest in enumerate(corpus.digests)}
    digests = {path: file_sha256(path) for path in dict.fromkeys(row.path for row in rows)}
    cosines, indices = nearest(
        embeddings, [position[digests[row.path]] for row in rows], config.top_k
    )
    return [
        [
            Candidate(corpus.names[i], corpus.paths[i], rank, cosine)
            for rank, (cosine, i) in enumerate(zip(row_cosines, row_indices, strict=True), start=1)
        ]
        for row_cosines, row_indices in zip(cosines.tolist(), indices.tolist(), strict=True)
    ]


def _run_group(
    rows: Sequence[SourceRow],
    candidates: Sequence[Sequence[Candidate]],
    rules: MaskRules,
    acceptance: Acceptance,
    generator: TransformersGenerator,
    fits: Fits,
) -> list[dict[str, Any]]:
    masked = mask_rows(rows, rules, generator, fits)
    outcomes = induce(rows, masked, candidates, acceptance, generator, fits)
    return [outcome.as_row() for outcome in outcomes]


def funnel(outcomes: Sequence[dict[str, Any]]) -> dict[str, Any]:
    """Counts: rows, how they were masked, accepted by rank, dropped by reason, refused candidates
    by reason.
    """
    accepted = [outcome for outcome in outcomes if not outcome["reason"]]
    return {
        "rows": len(outcomes),
        "masked_by": dict(
            Counter(outcome["masked_by"] for outcome in outcomes if outcome["masked"])
        ),
        "accepted": len(accepted),
        "accepted_by_rank": {
            str(k): v for k, v in sorted(Counter(o["rank"] for o in accepted).items())
        },
        "dropped": dict(Counter(outcome["reason"] for outcome in outcomes if outcome["reason"])),
        "refused_candidates": dict(
            Counter(attempt["reason"] for o in outcomes for attempt in o["refused"])
        ),
    }


def _records(
    rows: Sequence[SourceRow],
    outcomes: Sequence[dict[str, Any]],
    corpus: Corpus,
    config: BuildConfig,
) -> Iterator[Record]:
    paths = dict(zip(corpus.names, corpus.paths, strict=True))
    return (
        Record(
            id=row.id,
            images=(row.path.read_bytes(),),
            prompt=row.prompt,
            chosen=row.answer,
            rejected=outcome["completion"],
            rejected_images=(paths[outcome["image"]].read_bytes(),),
            meta={
                "masked": outcome["masked"],
                "masked_by": outcome["masked_by"],
                "retrieval": {
                    "rank": outcome["rank"],
                    "cosine": outcome["cosine"],
                    "encoder": "vision path of the model",
                },
                "similarity": {"model": config.similarity, "value": outcome["similarity"]},
                "attempts": len(outcome["refused"]) + 1,
                "generator": {"engine": "transformers", "decoding": "greedy", "seed": config.seed},
                "source": {
                    "file": config.source.name,
                    "image": row.image,
                    "retrieved_image": outcome["image"],
                },
            },
        )
        for row, outcome in zip(rows, outcomes, strict=True)
        if not outcome["reason"]
    )
