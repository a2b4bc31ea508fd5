"""The images of benchmarks: their paths, and a check that all of them can be read."""

from __future__ import annotations

import hashlib
from collections import defaultdict
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import NamedTuple

from realign.data.image_names import check_image_root, image_suffix, resolve_image
from realign.data.images import RefusedImage, Size, decode_image, read_image
from realign.errors import RefusedError
from realign.evaluation.benchmark import Benchmark, Task
from realign.evaluation.rows import Row
from realign.runtime.files import replacing
from realign.runtime.progress import Progress

SHOWN = 20  # problems of one benchmark that a message names


class Picture(NamedTuple):
    """An image of a benchmark."""

    path: Path
    sha256: str  # of the file
    size: Size


Pictures = Mapping[tuple[str, str], Picture]  # name of the benchmark and of the image -> image


@dataclass
class _Faults:
    """Images of one benchmark that cannot be used."""

    total: int = 0
    missing: list[str] = field(default_factory=list)
    looked_for: list[str] = field(default_factory=list)  # paths tried for the first missing image
    unreadable: list[str] = field(default_factory=list)


def read_pictures(
    tasks: Mapping[str, Task], data: Mapping[str, Path], images: Path, unpacked: Path
) -> dict[tuple[str, str], Picture]:
    """Find every image that a row names, and decode it once.

    Args:
        tasks: Name to task.
        data: Folder with the files of each benchmark.
        images: Folder of the images.
        unpacked: Folder to which :func:`unpack_pictures` will write the images that lie in files.
    Raises:
        RefusedError: Images are missing or unreadable; all are counted, and the first of each
            benchmark are named with their rows and paths.
    """
    found: dict[tuple[str, str], Picture] = {}
    faults: dict[str, _Faults] = defaultdict(_Faults)
    named = {
        (task.benchmark.name, row["image"]): (task.benchmark, row)
        for task in reversed([*tasks.values()])
        for row in reversed(task.rows)  # so that the first row with an image is kept
        if row["image"] is not None
    }
    packed = {task.benchmark.name for task in tasks.values() if task.benchmark.read_images}
    if any(name not in packed for name, _ in named):
        check_image_root(images)
    with Progress("check images", len(named)) as progress:
        for name in packed:
            found |= _packed(name, tasks, data, unpacked, named, faults[name], progress)
        for (name, image), (benchmark, row) in reversed(named.items()):
            if name not in packed:
                faults[name].total += 1
                picture = _read(benchmark, row, images, faults[name])
                if picture is not None:
                    found[name, image] = picture
                progress.advance()
    _refuse(faults, images)
    return found


def places(benchmark: Benchmark, row: Row) -> list[str]:
    """Return the paths below the folder of images at which a row's image may lie."""
    folder = benchmark.image_folder or benchmark.name
    names = benchmark.image_places(row)
    return [*(f"{folder}/{name}" for name in names), *names]


def _read(benchmark: Benchmark, row: Row, images: Path, faults: _Faults) -> Picture | None:
    candidates = places(benchmark, row)
    where = f"{row['where']}, {row['image']}"
    for place in candidates:
        try:
            path = resolve_image(images, place, row["where"])
            raw = read_image(path, where)
            return Picture(path, hashlib.sha256(raw).hexdigest(), decode_image(raw, where).size)
        except RefusedImage as error:
            if error.code != "missing":
                faults.unreadable.append(str(error))
                return None
    faults.missing.append(f"{row['where']}: image {row['image']!r} does not exist")
    faults.looked_for = faults.looked_for or [str(images / place) for place in candidates]
    return None


def _packed(
    name: str,
    tasks: Mapping[str, Task],
    data: Mapping[str, Path],
    unpacked: Path,
    named: Mapping[tuple[str, str], tuple[Benchmark, Row]],
    faults: _Faults,
    progress: Progress,
) -> Iterator[tuple[tuple[str, str], Picture]]:
    """Yield the images that lie in the files of a benchmark."""
    wanted = {image: row for (benchmark, image), (_, row) in named.items() if benchmark == name}
    faults.total = len(wanted)
    for image, raw in _raw_images(name, tasks, data):
        row = wanted.pop(image)
        where = f"{row['where']}, {image}"
        try:
            size = decode_image(raw, where).size
        except RefusedImage as error:
            faults.unreadable.append(str(error))
        else:
            path = unpacked / name / f"{image}{image_suffix(raw) or ''}"
            yield (name, image), Picture(path, hashlib.sha256(raw).hexdigest(), size)
        progress.advance()
    for row in wanted.values():
        faults.missing.append(f"{row['where']}: image {row['image']!r} is not in the file")
        faults.looked_for = faults.looked_for or [row["where"]]


def unpack_pictures(
    tasks: Mapping[str, Task], data: Mapping[str, Path], pictures: Pictures
) -> None:
    """Write the images that lie in the files of benchmarks, unless they are already written."""
    for name in {task.benchmark.name for task in tasks.values() if task.benchmark.read_images}:
        for image, raw in _raw_images(name, tasks, data):
            path = pictures[name, image].path
            if not path.is_file():
                with replacing(path) as temporary:
                    temporary.write_bytes(raw)


def _raw_images(
    name: str, tasks: Mapping[str, Task], data: Mapping[str, Path]
) -> Iterator[tuple[str, bytes]]:
    for task in tasks.values():
        if task.benchmark.name == name and task.benchmark.read_images:
            yield from task.benchmark.read_images(data[name] / task.files[0])


def _refuse(faults: Mapping[str, _Faults], images: Path) -> None:
    lines = []
    for name, found in sorted(faults.items()):
        if found.missing:
            lines.append(
                f"{name}: {len(found.missing):,} of {found.total:,} images are missing; the first "
                f"was looked for at {' and '.join(found.looked_for)}"
            )
            lines += _first(found.missing)
        if found.unreadable:
            lines.append(
                f"{name}: {len(found.unreadable):,} of {found.total:,} images cannot be read"
            )
            lines += _first(found.unreadable)
    if lines:
        shown = "\n".join(lines)
        raise RefusedError(
            f"images {images} must hold every image that is asked about, got:\n{shown}\nAdd or "
            "correct them, check --images, or name the other benchmarks with --benchmark."
        )


def _first(problems: Sequence[str]) -> list[str]:
    more = [f"  ... and {len(problems) - SHOWN:,} more"] if len(problems) > SHOWN else []
    return [*(f"  {problem}" for problem in problems[:SHOWN]), *more]
