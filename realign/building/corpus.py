"""The distinct images of a source. Each is read and decoded once; byte duplicates are one image."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict, dataclass
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from realign.data.formats.source_row import SourceRow
from realign.data.image_pool import inspect_images
from realign.data.images import MAX_BYTES, ImageFacts, RefusedImage, Size
from realign.errors import RefusedError
from realign.runtime.files import file_sha256, read_jsonl, write_jsonl
from realign.runtime.progress import Progress

# number of images per file of results, which is what a killed inspection can lose
PART = 4096


@dataclass(frozen=True)
class Corpus:
    """Distinct images in order of first appearance.

    Attributes:
        names: Unique names: those of the source, or hashes for images that the source embeds.
        own_names: Names in the source, also of embedded images.
        paths: The image files.
        facts: Hashes and sizes of the decoded images.
        position: Index of each file's image; byte duplicates have the same.
    """

    names: list[str]
    own_names: list[str]
    paths: list[Path]
    facts: list[ImageFacts]
    position: Mapping[Path, int]

    def __len__(self) -> int:
        return len(self.names)

    def digest_of(self, path: Path) -> str:
        """Return the SHA-256 of an image file."""
        return self.facts[self.position[path]].sha256

    @property
    def digests(self) -> list[str]:
        """Return the SHA-256 of every file."""
        return [facts.sha256 for facts in self.facts]

    @property
    def perceptual_hashes(self) -> NDArray[np.uint64]:
        """Perceptual hash of every image, 64 bits each."""
        return np.array([facts.perceptual_hash for facts in self.facts], dtype=np.uint64)


def inspect_corpus(
    rows: Sequence[SourceRow],
    folder: Path,
    workers: int,
    refusal: Callable[[Size], RefusedError | None] = lambda size: None,
) -> tuple[Corpus, dict[Path, RefusedImage]]:
    """Hash every image of ``rows``, and decode those that were not decoded before.

    Args:
        rows: The rows.
        folder: Folder of the results, one file for some thousand images, so that an inspection that
            was killed continues. Images are recognised by their content.
        workers: Number of processes that decode; 0 starts one per core.
        refusal: Function that returns the reason why an image of a size cannot be used although it
            can be decoded, or None.
    Returns:
        The usable images, and the refusals of the others.
    """
    first = {row.path: row for row in reversed(rows)}
    paths = list(dict.fromkeys(row.path for row in rows))
    parts = sorted(folder.glob("*.jsonl"))
    known = {line["sha256"]: ImageFacts(**line) for part in parts for line in read_jsonl(part)}
    digests = dict(zip(paths, _digests(paths), strict=True)) if known else {}
    unknown = [path for path in paths if digests.get(path) not in known]
    found: dict[Path, ImageFacts | RefusedImage] = {}
    with Progress("inspect images", len(paths), len(paths) - len(unknown)) as progress:
        for start in range(0, len(unknown), PART):
            chunk = unknown[start : start + PART]
            for path, facts in zip(chunk, inspect_images(chunk, workers=workers), strict=True):
                found[path] = facts
                progress.advance()
            seen = [found[path] for path in chunk]
            good = [asdict(facts) for facts in seen if isinstance(facts, ImageFacts)]
            if good:
                write_jsonl(folder / f"{len(parts) + start // PART:05d}.jsonl", good)
    refused = {path: facts for path, facts in found.items() if isinstance(facts, RefusedImage)}
    taken = [found[path] if path in found else known[digests[path] or ""] for path in paths]
    sizes = {(facts.width, facts.height) for facts in taken if isinstance(facts, ImageFacts)}
    refusals: dict[Size, RefusedError | None] = {}
    with Progress("check sizes of images", len(sizes)) as progress:
        for size in sorted(sizes):
            refusals[size] = refusal(size)
            progress.advance()
    place: dict[str, int] = {}
    position: dict[Path, int] = {}
    corpus = Corpus([], [], [], [], position)
    for path, facts in zip(paths, taken, strict=True):
        if isinstance(facts, RefusedImage):
            continue
        if error := refusals[facts.width, facts.height]:
            refused[path] = RefusedImage(str(path), str(error), error.code)
            continue
        if facts.sha256 not in place:
            place[facts.sha256] = len(corpus)
            row = first[path]
            corpus.names.append(row.image)
            corpus.own_names.append(row.source.get("image") or row.image)
            corpus.paths.append(path)
            corpus.facts.append(facts)
        position[path] = place[facts.sha256]
    return corpus, refused


def _digests(paths: Sequence[Path]) -> Iterator[str | None]:
    """Yield the hashes of files, computed by several threads; None if a file cannot be read."""
    with ThreadPoolExecutor() as pool:
        for start in range(0, len(paths), PART):
            yield from pool.map(_digest, paths[start : start + PART])


def _digest(path: Path) -> str | None:
    try:
        # a larger file is refused without being read
        return file_sha256(path) if path.stat().st_size <= MAX_BYTES else None
    except OSError:
        return None
