"""The rows of a build: they are read and sampled, and bad ones are left out."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path

from realign.building.corpus import Corpus, inspect_corpus
from realign.building.large_images import shrink_large_images
from realign.building.models import Readers
from realign.config import BuildConfig
from realign.data.formats.read_source import extract_images, read_source
from realign.data.formats.source_row import SourceRow
from realign.data.missing_images import where_missing_images_are
from realign.data.problems import shown_problems
from realign.data.records import Problem
from realign.errors import RefusedError
from realign.runtime.files import content_sha256
from realign.runtime.progress import announce


@dataclass(frozen=True)
class SourceRows:
    """Rows of a source, whose images exist but are not opened yet.

    Attributes:
        rows: The good rows, or a sample of them.
        problems: Problems of the bad rows.
        num_read: Number of rows of the source, good and bad.
        num_unsampled: Number of good rows that are not in the sample.
    """

    rows: list[SourceRow]
    problems: list[Problem]
    num_read: int
    num_unsampled: int = 0


def read_rows(
    config: BuildConfig, special: Sequence[str], readers: Readers, *, extracts: bool = True
) -> SourceRows:
    """Read the rows of a source, and sample them.

    Args:
        config: The build.
        special: The model's special tokens.
        readers: The models that will read the rows.
        extracts: Whether images that the source embeds are written into the output folder.
    Raises:
        RefusedError: Too many rows are bad, or there are fewer than the sample.
    """
    folder = config.out / "source_images"
    source = read_source(
        config.source,
        config.images,
        special=special,
        turns=config.turns,
        format=config.format,
        image_name=config.image_name,
        extract_to=folder,
        extracts=extracts and config.sample is None,
    )
    problems = [*source.problems]
    answered: list[SourceRow] = []
    for row in source.rows:
        text = "\n".join((row.instruction, row.answer, row.rejected))
        if flaw := readers.refusal_of_text(text):
            message = f"{row.place}: {flaw}"
            problems.append(Problem(row.id, row.place, "", "token-id", message))
            continue
        if row.answer or config.annotator:
            answered.append(row)
            continue
        unread = sorted(row.source.get("extra", {}))
        message = (
            f"{row.place}: answer must not be empty without an annotator"
            f"{f', got a row whose keys {unread[:8]} are not read' if unread else ''}. Fill it in, "
            "or name a model that answers in build.annotator."
        )
        problems.append(Problem(row.id, row.place, "answer", "empty-answer", message))
    _check_share(problems, source.num_read, config, answered, "; no image was decoded yet")
    if config.sample is None:
        return SourceRows(answered, problems, source.num_read)
    rows = sample_rows(answered, config.sample, config.seed, config.source.name)
    announce(
        f"sample: {len(rows):,} of the {len(answered):,} rows of {config.source.name}, by seed "
        f"{config.seed}"
    )
    if extracts:
        extract_images(config.source, rows, folder)
    return SourceRows(rows, problems, source.num_read, len(answered) - len(rows))


def sample_rows(rows: Sequence[SourceRow], size: int, seed: int, source: str) -> list[SourceRow]:
    """Return a random sample of rows, in the order of the source.

    Rows are drawn by their ids and the seed alone: a larger sample contains a smaller one, and rows
    that are added to the source or removed from it do not change the order of the others.

    Args:
        rows: The rows, with different ids.
        size: Size of the sample.
        seed: Seed of the sample.
        source: Name of the source, for messages.
    Raises:
        RefusedError: There are fewer rows than ``size``.
    """
    if size > len(rows):
        raise RefusedError(
            f"build.sample must be at most the {len(rows)} good rows of {source}, got {size}. "
            "Lower it, or leave it out to build from every row."
        )
    drawn = sorted(range(len(rows)), key=lambda i: content_sha256(str(seed), rows[i].id))[:size]
    return [rows[i] for i in sorted(drawn)]


def with_image_files(
    config: BuildConfig, rows: Sequence[SourceRow], scratch: Path
) -> list[SourceRow]:
    """Return the rows with image files: embedded images that are not in the output folder are
    written into ``scratch``.
    """
    folder = config.out / "source_images"
    found = [
        row
        if row.path.parent != folder or row.path.is_file()
        else replace(row, path=scratch / row.path.name)
        for row in rows
    ]
    extract_images(config.source, found, scratch)
    return found


def inspect_rows(
    config: BuildConfig, source: SourceRows, readers: Readers
) -> tuple[list[SourceRow], Corpus, list[Problem]]:
    """Decode the images of the rows. Return the good rows, their images, and the problems of the
    bad rows.

    Raises:
        RefusedError: Too many rows are bad, or fewer than two images are left.
    """
    shrunk, unshrunk = shrink_large_images(
        source.rows, config.out / "source_images", config.max_pixels or 0
    )
    corpus, unreadable = inspect_corpus(
        shrunk, config.out / "images", config.workers or 0, readers.refusal_of_image
    )
    unreadable |= unshrunk
    problems = [*source.problems]
    rows: list[SourceRow] = []
    for row in shrunk:
        if row.path in unreadable:
            refused = unreadable[row.path].at(f"{row.place}, {row.image}")
            if refused.code == "too-many-pixels":
                refused = refused.with_remedy("or raise build.max_pixels to have it shrunk")
            problems.append(Problem(row.id, row.place, "image", refused.code, str(refused)))
        else:
            rows.append(row)
    if config.sample is None:
        _check_share(problems, source.num_read, config, rows)
    else:  # all texts of the source were checked above, but only the images of the sample here
        _check_share(problems[len(source.problems) :], len(source.rows), config, rows)
    if len(corpus) < 2:
        bad = f", and these bad rows:\n{shown_problems(problems)}\n" if problems else ". "
        raise RefusedError(
            f"source must show at least 2 different images to retrieve from, got {len(corpus)}{bad}"
            "Add rows of other images; equal files are one image."
        )
    if problems:
        announce(
            f"{len(problems)} of {source.num_read} source rows are bad and left out; see "
            "rejected.jsonl"
        )
    return rows, corpus, problems


def _check_share(
    problems: Sequence[Problem],
    num_rows: int,
    config: BuildConfig,
    good: Sequence[SourceRow],
    note: str = "",
) -> None:
    """Refuse too many bad rows; leaving them out is suggested only if enough images are left."""
    bad = len({problem.place for problem in problems})  # a row may have several problems
    if bad > config.max_reject * num_rows:
        share = math.ceil(1000 * bad / num_rows) / 1000
        is_enough = len({row.path for row in good}) >= 2
        leave_out = f", or pass --set build.max_reject={share} to leave them out" * is_enough
        # with a wrong folder, the rows need no correction
        remedy = where_missing_images_are(
            config.images, problems, num_rows, "build.image_name", config.image_name
        )
        raise RefusedError(
            f"{bad} of {num_rows} rows of {config.source.name} are bad{note}, allowed are "
            f"{config.max_reject:.2%}:\n{shown_problems(problems)}\n"
            + (remedy or f"Correct them{leave_out}.")
        )
