"""The command ``realign build``: annotate, mask, embed, retrieve, induce and filter. Each stage has
shards of its own, and continues after a kill.

    <out>/build.json                      everything that the result depends on
    <out>/rejected.jsonl                  bad rows of the source, with reasons
    <out>/images/00003.jsonl              hashes and sizes of the images
    <out>/source_images/                  images that the source embeds
    <out>/annotated/00003.jsonl           answers of the annotator
    <out>/masked/00003.jsonl              masked answers
    <out>/embeddings/00003.safetensors    embeddings of a range of images
    <out>/neighbours/00003.safetensors    neighbours of a range of images
    <out>/shards/00003.jsonl              outcomes of a range of rows, accepted or not, with reasons
    <out>/journal/                        answers of servers
    <out>/dataset.parquet                 the accepted pairs
    <out>/funnel.json                     counts of rows by outcome
"""

from __future__ import annotations

import shutil
from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

from realign.building.assemble import assemble, funnel
from realign.building.corpus import Corpus
from realign.building.masking.lexicon import Lexicon
from realign.building.masking.masker import MaskRules
from realign.building.masking.remnants import GAPS
from realign.building.models import ServedModel, check_sections
from realign.building.plan import make_plan, parts_of
from realign.building.similarity import similarity_identity
from realign.building.source import inspect_rows, read_rows
from realign.building.staging import Staging
from realign.config import BuildConfig
from realign.data.decisions import RowKey, decisions_path, read_decisions
from realign.data.formats.parquet import read_metadata, write_parquet
from realign.data.formats.source_row import SourceRow
from realign.data.image_names import check_image_root
from realign.data.records import Problem, Record
from realign.data.unrelated_answers import (
    InducedAnswer,
    induced_similarities,
    unrelated_answers,
)
from realign.errors import RefusedError
from realign.modeling.chat_template import Renderer
from realign.modeling.folder import resolve_model
from realign.modeling.identity import machine_numerics
from realign.modeling.processors import load_processor
from realign.runtime.files import content_sha256, file_sha256, replacing, write_json, write_jsonl
from realign.runtime.progress import announce
from realign.runtime.run_folder import check_out, claim, is_begun, is_claimed, only_run
from realign.runtime.strict_json import read_json

ENGLISH_LEXICON = Path(__file__).parent / "masking" / "lexicon.yaml"
REFUSALS = Path(__file__).with_name("refusals.yaml")
# options that do not change the result: places on this machine, and the speed of the run
NOT_IDENTITY = {
    *("out", "source", "images", "image_name", "model", "lexicon"),
    *("engine", "workers", "max_reject"),
    *("annotator", "masker", "inducer", "encoder", "similarity"),  # their identities are stored
}
# options that are stored only if they have an effect
IF_GIVEN = ("max_length", "max_pixels", "sample")


def build(config: BuildConfig, *, dry_run: bool = False) -> Path:
    """Build a dual-preference dataset and return its parquet file. After an interruption, the same
    call continues the build.

    Args:
        config: The build.
        dry_run: Whether to show the plan and stop without writing anything. Each server is asked
            one question, and models of this process answer a few rows, to measure the time.
    Raises:
        RefusedError: Too many source rows are bad, a server cannot be used, the output folder holds
            another run, no row gave a pair, or the decision file drops all pairs.
    """
    check_out(config.out)
    _check_paths(config)
    check_sections(config)
    lexicon_path = config.lexicon or ENGLISH_LEXICON
    rules = MaskRules(
        config.mask,
        Lexicon.load(lexicon_path),
        config.mask_rates,
        config.seed,
        level=config.mask_level,
        retries=config.mask_retries,
    )
    rules.lexicon.check_rates(config.mask_rates)
    # from here on, models may be downloaded
    similarity = similarity_identity(config.similarity)
    folder = resolve_model(config.model)
    special = tuple(Renderer(load_processor(folder)).placeholders())
    staging = Staging(config, special)
    readers = staging.readers(folder)
    source = read_rows(config, special, readers, extracts=not dry_run)
    dataset = config.out / "dataset.parquet"
    with TemporaryDirectory() as scratch:
        _show_plan(config, staging, source.rows, rules, Path(scratch), dry_run=dry_run)
        if dry_run:
            return dataset
        rows, corpus, problems = inspect_rows(config, source, readers)
        unused = {name for name in IF_GIVEN if getattr(config, name) is None}
        if not _has_large_images(rows, problems):
            unused.add("max_pixels")
        facts = {
            "config": config.model_dump(mode="json", exclude=NOT_IDENTITY | unused),
            "source": _content(config.source),
            "images": corpus.digests,
            "rows": [content_sha256(row.id, corpus.digest_of(row.path)) for row in rows],
            "special": sorted({*special} - {""}),
            "lexicon": file_sha256(lexicon_path),
            "refusals": file_sha256(REFUSALS),
            "gaps": file_sha256(GAPS),
            "similarity": similarity,
            "models": staging.identities(),
            "numerics": machine_numerics(),
        }
        labels = {"images": corpus.names, "rows": [row.id for row in rows]}
        dropped = _Dropped.of(dataset)
        is_old = is_claimed(config.out, "build", facts, labels)
        if is_old and dataset.is_file() and _is_written(config.out, dropped):
            return dataset
        with only_run(config.out, "build"):
            claim(config.out, "build", facts, labels)
            _keep_answers(Path(scratch), config.out / "journal")
            write_jsonl(config.out / "rejected.jsonl", map(asdict, problems))
            bad = Counter(problem.code for problem in problems)
            _run(config, staging, rules, rows, corpus, dropped, bad, source.num_unsampled)
    return dataset


def _has_large_images(rows: Sequence[SourceRow], problems: Sequence[Problem]) -> bool:
    """Return whether there are images for which ``max_pixels`` makes a difference."""
    return any(row.source.get("is_shrunk") for row in rows) or any(
        problem.code == "too-many-pixels" for problem in problems
    )


def _show_plan(
    config: BuildConfig,
    staging: Staging,
    rows: Sequence[SourceRow],
    rules: MaskRules,
    scratch: Path,
    *,
    dry_run: bool,
) -> None:
    """Check the servers and announce the plan, unless the build is finished."""
    is_begun_before = is_begun(config.out, "build")
    if is_begun_before and (config.out / "funnel.json").is_file() and not dry_run:
        return
    parts = parts_of(config, staging, rows)
    checked = set()
    for asked in (part.asked for part in parts):
        if isinstance(asked, ServedModel) and asked.address not in checked:
            checked.add(asked.address)
            try:
                asked.check_server()
            except RefusedError as error:
                # the rest of the build may not need this server
                if dry_run or not is_begun_before:
                    raise
                announce(f"note: {error}")
    for line in make_plan(
        config,
        staging,
        rows,
        rules,
        parts,
        scratch,
        # a build that continues has shown its plan before
        asks=dry_run or not is_begun_before,
        loads=dry_run,
    ):
        announce(line)


def _keep_answers(scratch: Path, folder: Path) -> None:
    """Keep the servers' answers to the plan's questions, so that these are not asked again."""
    for path in scratch.glob("*.jsonl"):
        if not (folder / path.name).exists():
            with replacing(folder / path.name) as temporary:
                shutil.copyfile(path, temporary)


def _run(
    config: BuildConfig,
    staging: Staging,
    rules: MaskRules,
    rows: list[SourceRow],
    corpus: Corpus,
    dropped: _Dropped,
    bad: Counter[str],
    num_unsampled: int,
) -> None:
    """Run every stage, then write the dataset and at last the counts, which finish the build."""
    neighbours = staging.retrieve(corpus)
    rows, unanswered = staging.annotate(rows)
    masked = staging.mask(rows, rules)
    outcomes = staging.induce(rows, masked, neighbours, unanswered)
    counts = funnel(
        outcomes,
        rejected=bad,
        unsampled=num_unsampled,
        annotated=sum(row.is_annotated for row in rows),
        excluded=neighbours.excluded,
    )
    decisions = counts["decisions"] = {"sha256": dropped.digest, "dropped": 0}
    if counts["accepted"]:
        records = assemble(rows, outcomes, corpus, staging.provenance())
        write_parquet(_undropped(records, dropped, decisions), config.out / "dataset.parquet")
    write_json(config.out / "funnel.json", counts)
    induced = (
        InducedAnswer(row.answer, outcome["masked"], outcome["completion"])
        for row, outcome in zip(rows, outcomes, strict=True)
        if not outcome["reason"] and not row.rejected
    )
    if warning := unrelated_answers(induced_similarities(induced)):
        announce(f"warning: {warning}")
    if not counts["accepted"]:
        raise RefusedError(
            f"source must give at least one pair, got none from {counts['rows']} rows: "
            f"{counts['dropped']}. See {config.out / 'funnel.json'}."
        )
    if decisions["dropped"] == counts["accepted"]:
        raise RefusedError(
            f"{dropped.path} must keep at least one row, drops all {counts['accepted']}. Decide "
            "again with `realign browse`, or remove the file."
        )


@dataclass(frozen=True)
class _Dropped:
    """Rows that the decision file of a dataset drops, and the hash of the file."""

    path: Path
    digest: str | None
    rows: set[RowKey]

    @classmethod
    def of(cls, dataset: Path) -> _Dropped:
        path = decisions_path(dataset)
        decisions = read_decisions(path)
        return cls(
            path,
            file_sha256(path) if path.is_file() else None,
            {row for row, decision in decisions.items() if decision.decision == "drop"},
        )


def _content(source: Path) -> str:
    """Return the hash of a source file, or of every file of a source folder."""
    if source.is_file():
        return file_sha256(source)
    files = sorted(path for path in source.rglob("*") if path.is_file())
    return content_sha256(
        *(part for path in files for part in (str(path.relative_to(source)), file_sha256(path)))
    )


def _check_paths(config: BuildConfig) -> None:
    """Refuse missing files and folders, and an output that the source would contain, before the
    model is opened.
    """
    if not config.source.exists():
        raise RefusedError(
            f"source must be a file or folder, got {config.source}, which does not exist. Check "
            "--source."
        )
    if config.source.is_dir() and config.out.resolve().is_relative_to(config.source.resolve()):
        raise RefusedError(
            f"out must lie outside the source folder {config.source}, all of whose files are part "
            f"of the source, got {config.out}. Choose another --out."
        )
    if config.images is not None:
        check_image_root(config.images)


def _is_written(out: Path, dropped: _Dropped) -> bool:
    """Return whether dataset.parquet is whole and was made with this decision file."""
    path = out / "funnel.json"
    if not path.is_file():
        return False
    counts = read_json(path)
    rows = counts["accepted"] - counts["decisions"]["dropped"]
    if rows <= 0 or counts["decisions"]["sha256"] != dropped.digest:
        return False
    try:
        num_rows: int = read_metadata(out / "dataset.parquet").num_rows
    except RefusedError:  # cut off or overwritten
        return False
    return num_rows == rows


def _undropped(
    records: Iterator[Record], dropped: _Dropped, counts: dict[str, Any]
) -> Iterator[Record]:
    """Yield the kept records, and count those that the decision file drops."""
    for record in records:
        if RowKey(record.id, record.key) in dropped.rows:
            counts["dropped"] += 1
        else:
            yield record
