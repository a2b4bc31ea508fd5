"""Make the missing shards of a stage in processes or on Ray; each is written when it is done."""

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
    """The way to run the work on shards, whose content does not depend on the engine.

    Attributes:
        kind: ``process``, or ``ray``.
        workers: Number of processes or actors; None is one per GPU, or as many as the cores and
            memory of the machine or cluster allow.
        threads: CPU threads per worker. Sums of a matrix product may depend on it in the last bit,
            so it is independent of the number of workers.
        worker_bytes: Memory that a worker needs, to choose the number of workers.
    """

    kind: Literal["process", "ray"] = "process"
    workers: int | None = None
    threads: int = 1
    worker_bytes: int = 0

    def run(self, task: Task, items: Mapping[int, Any]) -> Iterator[tuple[int, bytes]]:
        """Yield the number and result of every item when it is done, in any order."""
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
        """Return the number of workers for some items. For Ray it is 1 unless ``workers`` is given,
        since the cluster is not asked.
        """
        if self.kind == "ray":
            return min(self.workers or 1, num_items)
        return min(self.workers or torch.cuda.device_count() or self._fitting(), num_items)

    def _fitting(self) -> int:
        """Return how many workers fit into half of the memory with one core per thread."""
        memory = usable_memory() // 2
        cores = usable_cores() // self.threads
        return max(1, min(cores, memory // max(self.worker_bytes, 1)))


def _environment(worker: int, gpus: int) -> dict[str, str]:
    """Return the environment variables that restrict a worker to one of this process's GPUs."""
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
    """Items that are made on access, since not all of a large build fit into memory at once."""

    def __init__(self, numbers: Collection[int], make: Callable[[int], Any]) -> None:
        self._numbers, self._make = numbers, make

    def __getitem__(self, number: int) -> Any:
        return self._make(number)

    def __iter__(self) -> Iterator[int]:
        return iter(self._numbers)

    def __len__(self) -> int:
        return len(self._numbers)


def make_shards(
    stage: str,
    missing: Collection[int],
    sizes: Mapping[int, int],
    item: Callable[[int], Any],
    task: Task,
    engine: Engine,
    keep: Callable[[int, bytes], None],
) -> None:
    """Make shards, and store each as soon as it is made.

    Args:
        stage: Name of the stage, for progress.
        missing: Numbers of the shards to make.
        sizes: Number of records of every shard, by the shard's number.
        item: Function that makes the task's argument.
        task: Task that makes the content of a shard.
        engine: Engine that runs the task.
        keep: Called with the number and content of every shard made.
    """
    if not missing:
        return
    total = sum(sizes.values())
    done = total - sum(sizes[number] for number in missing)
    with Progress(stage, total, done) as progress:
        for number, content in engine.run(task, LazyItems(missing, item)):
            keep(number, content)
            progress.advance(sizes[number])


def fill_shards(
    stage: str,
    paths: Mapping[int, Path],
    sizes: Mapping[int, int],
    item: Callable[[int], Any],
    task: Task,
    engine: Engine,
) -> None:
    """Make the missing shard files; each is written whole as soon as it is made.

    Args:
        paths: File of each shard, by its number. The other arguments are those of
            :func:`make_shards`.
    """

    def keep(number: int, content: bytes) -> None:
        with replacing(paths[number]) as temporary:
            temporary.write_bytes(content)

    missing = [number for number, path in paths.items() if not path.is_file()]
    make_shards(stage, missing, sizes, item, task, engine, keep)
