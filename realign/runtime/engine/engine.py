"""Chooses where a stage's missing shards are made, and writes them as they come."""

from __future__ import annotations

import os
from collections.abc import Callable, Collection, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import torch

from realign.runtime.engine.processes import run_in_processes
from realign.runtime.engine.ray_data import run_on_ray
from realign.runtime.engine.task import Task
from realign.runtime.files import replacing
from realign.runtime.memory import usable_cores, usable_memory
from realign.runtime.progress import Progress


@dataclass(frozen=True)
class Engine:
    """Where shards are made. What is made does not depend on it.

    Attributes:
        kind: ``process``, or ``ray``.
        workers: Processes or actors; None for one a GPU, or as many as cores and memory allow (of
            the machine, or of the cluster).
        threads: CPU threads a worker. Sums of a matrix product may depend on it in the last bit,
            so it does not follow the number of workers.
        worker_bytes: Memory that a worker needs, to choose their number.
    """

    kind: Literal["process", "ray"] = "process"
    workers: int | None = None
    threads: int = 1
    worker_bytes: int = 0

    def run(self, task: Task, items: Mapping[int, Any]) -> Iterator[tuple[int, bytes]]:
        """Yield the number and result of every item as they get done, in any order."""
        if not items:
            return
        if self.kind == "ray":
            yield from run_on_ray(task, items, self.workers, self.threads, self.worker_bytes)
            return
        gpus = torch.cuda.device_count()
        workers = self.num_workers(len(items))
        if workers == 1:
            yield from _run_here(task, items, self.threads)
        else:
            environments = [_environment(worker, gpus) for worker in range(workers)]
            yield from run_in_processes(task, items, environments, self.threads)

    def num_workers(self, num_items: int) -> int:
        """Return how many workers share so many items; of Ray, where the number is not given, one:
        the cluster is not asked.
        """
        if self.kind == "ray":
            return min(self.workers or 1, num_items)
        return min(self.workers or torch.cuda.device_count() or self._fitting(), num_items)

    def _fitting(self) -> int:
        """Workers of a machine without GPUs: half its memory for them, a core for each thread."""
        memory = usable_memory() // 2
        cores = usable_cores() // self.threads
        return max(1, min(cores, memory // max(self.worker_bytes, 1)))


def _environment(worker: int, gpus: int) -> dict[str, str]:
    """Shows a worker one GPU of those that this process sees."""
    if not gpus:
        return {}
    visible = os.environ.get("CUDA_VISIBLE_DEVICES")
    names = visible.split(",") if visible else [str(gpu) for gpu in range(gpus)]
    return {"CUDA_VISIBLE_DEVICES": names[worker % gpus]}


def _run_here(task: Task, items: Mapping[int, Any], threads: int) -> Iterator[tuple[int, bytes]]:
    before = torch.get_num_threads()
    torch.set_num_threads(threads)
    try:
        with task.open() as work:
            for number, item in items.items():
                yield number, work(item)
    finally:
        torch.set_num_threads(before)


class LazyItems(Mapping[int, Any]):
    """Items that are made when they are handed out, to a process or to Ray as a part of all: those
    of a large build do not fit at once.
    """

    def __init__(self, numbers: Collection[int], make: Callable[[int], Any]) -> None:
        self._numbers, self._make = numbers, make

    def __getitem__(self, number: int) -> Any:
        return self._make(number)

    def __iter__(self) -> Iterator[int]:
        return iter(self._numbers)

    def __len__(self) -> int:
        return len(self._numbers)


def make_shards(
    what: str,
    missing: Collection[int],
    sizes: Mapping[int, int],
    item: Callable[[int], Any],
    task: Task,
    engine: Engine,
    keep: Callable[[int, bytes], None],
) -> None:
    """Make shards and keep each as soon as it is made.

    Args:
        what: Name of the stage, for progress.
        missing: Numbers of the shards to make.
        sizes: Shard number to how many records it has, for all shards.
        item: Makes what the task is called with.
        task: Makes the content of a shard.
        engine: Where.
        keep: Called with the number and content of every shard made.
    """
    if not missing:
        return
    total = sum(sizes.values())
    done = total - sum(sizes[number] for number in missing)
    with Progress(what, total, done) as progress:
        for number, content in engine.run(task, LazyItems(missing, item)):
            keep(number, content)
            progress.advance(sizes[number])


def fill_shards(
    what: str,
    paths: Mapping[int, Path],
    sizes: Mapping[int, int],
    item: Callable[[int], Any],
    task: Task,
    engine: Engine,
) -> None:
    """Make the shard files that are not there; each appears whole, as soon as it is made.

    Args:
        paths: Shard number to its file. The other arguments are those of :func:`make_shards`.
    """

    def keep(number: int, content: bytes) -> None:
        with replacing(paths[number]) as temporary:
            temporary.write_bytes(content)

    missing = [number for number, path in paths.items() if not path.is_file()]
    make_shards(what, missing, sizes, item, task, engine, keep)
