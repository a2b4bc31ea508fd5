"""Search for images that a dataset names and its image folder does not have."""

from __future__ import annotations

import os
import shlex
from collections.abc import Iterator, Sequence
from pathlib import Path, PurePosixPath
from typing import NamedTuple

from realign.data.image_names import is_outside_name, is_url
from realign.data.records import Problem

TRIED = 100  # names that a guess is tried with
FOUND = 0.9  # share of them that it has to find
FOLDERS = 50  # subfolders that are looked into
LEVELS = 3  # folders above that are looked into


class _Guess(NamedTuple):
    """A folder and the name of the file of ``{name}`` in it."""

    folder: Path
    pattern: str

    def path(self, name: str) -> Path:
        return self.folder / self.pattern.replace("{name}", name)


def where_missing_images_are(
    root: Path | None,
    problems: Sequence[Problem],
    num_rows: int,
    option: str = "",
    file_name: str = "{name}",
) -> str:
    """Return a sentence with the option that finds most of the missing images; empty if they are
    nowhere near the folder, or the problem is another one.

    They are looked for in the folder under a longer name that ends with theirs, in the folders in
    it, and in those above it.

    Args:
        root: The image folder.
        problems: What is wrong with the rows.
        num_rows: How many rows there are. Where fewer than half lack their image, the folder is not
            the wrong one.
        option: The option that says what a file is called, if the command has one.
        file_name: Its value.
    """
    names = list(dict.fromkeys(problem.missing for problem in problems if problem.missing))
    lacking = {problem.place for problem in problems if problem.missing}
    if root is None or not names or 2 * len(lacking) <= num_rows:
        return ""
    tried = [name for name in names[:TRIED] if not is_url(name) and not is_outside_name(name)]
    for guess in _guesses(root, tried[0]) if tried else ():
        if guess == (root, file_name):
            continue
        if sum(_is_file(guess.path(name)) for name in tried) < FOUND * len(tried):
            continue
        options = [] if guess.folder == root else [f"--images {shlex.quote(str(guess.folder))}"]
        file = guess.path(tried[0])
        found_at = file.name if guess.folder == root else str(file)
        if guess.pattern != file_name:
            if not option:
                return f"{found_at} is there: give the files the names that the data has."
            options.append(f"--set {option}={guess.pattern}")
        return f"{found_at} is there: pass {' '.join(options)}."
    return ""


def _guesses(root: Path, name: str) -> Iterator[_Guess]:
    """Yield guesses at the place of an image, nearest first."""
    yield _Guess(root, "{name}")  # an option gave it another name
    yield from _longer(root, name)
    below = sorted(entry.path for entry in _entries(root) if entry.is_dir())[:FOLDERS]
    for folder in map(Path, below):
        yield _Guess(folder, "{name}")
        yield from _longer(folder, name)
    if len(PurePosixPath(name).parts) > 1:
        for folder in list(root.absolute().parents)[:LEVELS]:
            yield _Guess(folder, "{name}")


def _longer(folder: Path, name: str) -> Iterator[_Guess]:
    """Yield the file whose longer name ends with ``name``, if only one does."""
    found = [entry.name for entry in _entries(folder) if entry.name.endswith(name)]
    longer = sorted(one for one in found if one != name)
    if len(longer) == 1:
        yield _Guess(folder, longer[0].removesuffix(name) + "{name}")


def _entries(folder: Path) -> Iterator[os.DirEntry[str]]:
    try:
        with os.scandir(folder) as entries:
            yield from entries
    except OSError:
        return


def _is_file(path: Path) -> bool:
    try:
        return path.is_file()
    except (OSError, ValueError):
        return False
