"""The benchmarks that ``realign eval`` knows, and which of them a folder holds."""

from __future__ import annotations

from pathlib import Path

from realign.errors import RefusedError
from realign.evaluation.benchmark import Benchmark, Task
from realign.evaluation.benchmarks.chair import CHAIR
from realign.evaluation.benchmarks.pope import POPE
from realign.runtime.progress import announce

BENCHMARKS: tuple[Benchmark, ...] = (
    POPE,
    CHAIR,
)


def read_tasks(data: Path) -> dict[str, Task]:
    """Read the tasks whose files a folder holds, and announce the missing ones.

    Raises:
        RefusedError: All are missing, or a file has another form than its benchmark requires.
    """
    paths = {
        task: (benchmark, data / files[0])
        for benchmark in BENCHMARKS
        for task, files in benchmark.files.items()
    }
    tasks = {
        task: Task(benchmark, benchmark.read(path))
        for task, (benchmark, path) in paths.items()
        if path.is_file()
    }
    names = [path.name for _, path in paths.values()]
    if not tasks:
        raise RefusedError(
            f"data must hold {', '.join(names[:-1])} or {names[-1]}, got {data}, which has none. "
            "Write at least one; docs/evaluation.md says what a line holds."
        )
    if absent := [path.name for task, (_, path) in paths.items() if task not in tasks]:
        announce(f"not measured, since {data} does not hold them: {', '.join(absent)}")
    return tasks
