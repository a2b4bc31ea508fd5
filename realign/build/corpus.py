"""The images that a source shows, each read and decoded once: by content, so that byte duplicates
are one image.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict, dataclass
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from realign.build.row import SourceRow
from realign.files import file_sha256, read_jsonl, write_jsonl
from realign.images import RefusedImage
from realign.inspection import ImageFacts, inspect_images
from realign.progress import Progress


@dataclass(frozen=True)
class Corpus:
    """Distinct images in order of first appearance.

    Attributes:
        names: As the source names them.
        paths: Their files.
        facts: What was seen when they were decoded.
        position: File to its place; byte duplicates share one.
    """

    names: list[str]
    paths: list[Path]
    facts: list[ImageFacts]
    position: Mapping[Path, int]

    def __len__(self) -> int:
        return len(self.names)

    @property
    def digests(self) -> list[str]:
        """SHA-256 of every file."""
        return [facts.sha256 for facts in self.facts]

    @property
    def perceptual_hashes(self) -> NDArray[np.uint64]:
        """64 bits an image."""
        return np.array([facts.perceptual_hash for facts in self.facts], dtype=np.uint64)

    def save(self, path: Path) -> None:
        """Keep what was seen."""
        write_jsonl(path, map(asdict, self.facts))


def inspect_corpus(
    rows: Sequence[SourceRow], seen: Path, workers: int
) -> tuple[Corpus, dict[Path, RefusedImage]]:
    """Hash every image of ``rows``, and decode those not seen before.

    Args:
        rows: The rows.
        seen: File of :meth:`Corpus.save`; it need not be there.
        workers: Processes that decode; 0 for one a core.
    Returns:
        The readable images, and why the others are not.
    """
    names: dict[Path, str] = {}
    for row in rows:
        names.setdefault(row.path, row.image)
    known = (
        {line["sha256"]: ImageFacts(**line) for line in read_jsonl(seen)} if seen.is_file() else {}
    )
    digests: dict[Path, str] = {}
    if known:
        with ThreadPoolExecutor() as pool:
            digests = dict(zip(names, pool.map(file_sha256, names), strict=True))
    unknown = [path for path in names if digests.get(path) not in known]
    found: dict[Path, ImageFacts | RefusedImage] = {}
    with Progress("inspect images", len(names), len(names) - len(unknown)) as progress:
        for path, facts in zip(unknown, inspect_images(unknown, workers=workers), strict=True):
            found[path] = facts
            progress.advance()
    refused = {path: facts for path, facts in found.items() if isinstance(facts, RefusedImage)}
    place: dict[str, int] = {}
    position: dict[Path, int] = {}
    corpus = Corpus([], [], [], position)
    for path, name in names.items():
        facts = found[path] if path in found else known[digests[path]]
        if isinstance(facts, RefusedImage):
            continue
        if facts.sha256 not in place:
            place[facts.sha256] = len(corpus)
            corpus.names.append(name)
            corpus.paths.append(path)
            corpus.facts.append(facts)
        position[path] = place[facts.sha256]
    return corpus, refused
