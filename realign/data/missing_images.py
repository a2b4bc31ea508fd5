"""Search for images that a dataset names but that its image folder does not have."""

from __future__ import annotations

import os
import shlex
from collections.abc import Iterator, Sequence
from pathlib import Path, PurePosixPath
from typing import NamedTuple

from realign.data.image_names import is_outside_name, is_url
from realign.data.records import Problem

TRIED = 100  # number of names that a guess is tested with
FOUND = 0.9  # share of these names that it must find
FOLDERS = 50  # number of subfolders that are searched
LEVELS = 3  # number of parent folders that are searched


class _Guess(NamedTuple):
    """A folder, and the file name in it of an image called ``{name}``."""

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
    not found, or if images are not the main problem.

    The folder is searched for longer names that end with the missing ones, then its subfolders and
    its parent folders.

    Args:
        root: The image folder.
        problems: Problems of the rows.
        num_rows: Number of rows. If at most half of them lack their image, the folder is taken to
            be the right one.
        option: Option that sets the file names of images, if the command has one.
        file_name: Value of that option.
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
                return f"{found_at} exists: rename the files to the names in the data."
            options.append(f"--set {option}={guess.pattern}")
        return f"{found_at} exists: pass {' '.join(options)}."
    return ""


def _guesses(root: Path, name: str) -> Iterator[_Guess]:
    """Yield guesses at the place of an image, the nearest first."""
    yield _Guess(root, "{name}")  # an option may have given it another name
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
    longer = sorted(other for other in found if other != name)
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
