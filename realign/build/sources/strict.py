"""A source of which every row must be good and have an answer, its images included."""

from __future__ import annotations

from collections.abc import Iterable
from pathlib import Path

from realign.build.row import SourceRow
from realign.build.sources.read import read_source
from realign.images import decode_image
from realign.records import refuse_problems


def read_every_row(path: Path, image_root: Path, special: Iterable[str] = ()) -> list[SourceRow]:
    """Read a source and decode each of its images.

    Raises:
        RefusedError: A row or an image is refused.
    """
    source = read_source(path, image_root, special=special)
    problems = [problem.message for problem in source.problems]
    problems += [
        f"{path.name}, row {row.id}: answer must not be empty. Fill it in or remove the row."
        for row in source.rows
        if not row.answer
    ]
    refuse_problems(problems, source.num_read)
    for file, name in {row.path: row.image for row in source.rows}.items():
        decode_image(file.read_bytes(), f"{path.name}, {name}")
    return source.rows
