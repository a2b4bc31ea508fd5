"""The benchmarks that ``realign eval`` knows, and which of them a folder holds."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from contextlib import suppress
from pathlib import Path

from realign.errors import RefusedError
from realign.evaluation.benchmark import Benchmark, MissingData, Task
from realign.evaluation.benchmarks.amber import AMBER_DISCRIMINATIVE
from realign.evaluation.benchmarks.chair import CHAIR
from realign.evaluation.benchmarks.hallusionbench import HALLUSIONBENCH
from realign.evaluation.benchmarks.mmbench import MMBENCH
from realign.evaluation.benchmarks.mme import MME
from realign.evaluation.benchmarks.pope import POPE
from realign.evaluation.benchmarks.scienceqa import SCIENCEQA
from realign.evaluation.benchmarks.textvqa import TEXTVQA, VIZWIZ
from realign.runtime.progress import announce

BENCHMARKS: tuple[Benchmark, ...] = (
    POPE,
    HALLUSIONBENCH,
    AMBER_DISCRIMINATIVE,
    CHAIR,
    MME,
    MMBENCH,
    SCIENCEQA,
    TEXTVQA,
    VIZWIZ,
)


def find_benchmark(name: str) -> Benchmark:
    """Return the benchmark of a name.

    Raises:
        RefusedError: There is none.
    """
    known = {benchmark.name: benchmark for benchmark in BENCHMARKS}
    if name not in known:
        raise RefusedError(
            f"benchmark must be one of {', '.join(known)}, got {name!r}. Name one of them."
        )
    return known[name]


def find_data(data: Path, names: Sequence[str]) -> dict[str, Path]:
    """Return the folder with the files of each benchmark to ask: ``data`` itself, or the folder in
    it that has the benchmark's name.

    Args:
        data: The folder.
        names: The benchmarks; none for all whose files are there, where the others are announced.
    Raises:
        RefusedError: A name is unknown or given twice, a named benchmark has no files or there is
            none at all, or a benchmark has files in both places.
    """
    if again := next((name for name in names if names.count(name) > 1), None):
        raise RefusedError(f"benchmark must name each one once, got {again!r} again. Drop one.")
    chosen = [find_benchmark(name) for name in names] or BENCHMARKS
    folders = {benchmark.name: _folder_of(benchmark, data) for benchmark in chosen}
    absent = [name for name, folder in folders.items() if folder is None]
    if absent and names:
        find_benchmark(absent[0]).find_layout(data)  # which says what it looks for
    if len(absent) == len(folders):
        files = "; ".join(
            f"{benchmark.name}: {next(iter(benchmark.layouts[0].files.values()))[0]}"
            for benchmark in chosen
        )
        raise RefusedError(
            f"data must hold the files of a benchmark ({files}; and so on), got {data}, which has "
            "none. Check --data; docs/evaluation.md lists all files."
        )
    if absent:
        announce(f"not asked, since {data} does not hold them: {', '.join(absent)}")
    return {name: folder for name, folder in folders.items() if folder is not None}


def read_tasks(folders: Mapping[str, Path]) -> dict[str, Task]:
    """Read the tasks of benchmarks, and announce what of them is not there or not read.

    Args:
        folders: From :func:`find_data`.
    Raises:
        RefusedError: A file has another form than its benchmark requires.
    """
    tasks: dict[str, Task] = {}
    for name, folder in folders.items():
        benchmark = find_benchmark(name)
        found, layout = benchmark.read_tasks(folder), benchmark.find_layout(folder)
        absent = [files[0] for task, files in layout.files.items() if task not in found]
        if absent:
            announce(f"{name}: {folder} does not hold {', '.join(absent)}")
        others = [other for other in benchmark.layouts if other is not layout]
        if unread := [file for other in others if (file := other.first_in(folder))]:
            announce(
                f"{name}: {layout.first_in(folder)} and so on are read; {' and '.join(unread)} in "
                f"{folder} are not. Move what is to be asked into another folder"
            )
        tasks |= found
    return tasks


def _folder_of(benchmark: Benchmark, data: Path) -> Path | None:
    found = []
    for folder in (data, data / benchmark.name):
        with suppress(MissingData):
            benchmark.find_layout(folder)
            found.append(folder)
    if len(found) > 1:
        raise RefusedError(
            f"data must hold {benchmark.title} once, got files of it in {found[0]} and in "
            f"{found[1]}. Move those that are not to be asked."
        )
    return found[0] if found else None
