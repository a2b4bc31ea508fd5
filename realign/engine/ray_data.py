"""Runs a task on a Ray cluster with Ray Data: the one that RAY_ADDRESS names, or a local one.

Models and images must lie at the same path on every node; results come back to the driver, which
alone writes.
"""

from __future__ import annotations

import logging
import os
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any

from realign.engine.task import Task
from realign.errors import RefusedError


def run_on_ray(
    task: Task, items: Mapping[int, Any], workers: int | None, threads: int
) -> Iterator[tuple[int, bytes]]:
    """Yield the number and result of every item as they get done, in any order.

    Args:
        task: What is done.
        items: Number to item.
        workers: Actors; None for one a GPU of the cluster, or one for each ``threads`` of its
            cores.
        threads: CPU threads an actor.
    Raises:
        RefusedError: Ray is not installed.
    """
    os.environ.setdefault("RAY_USAGE_STATS_ENABLED", "0")
    try:
        import ray
        import ray.data
    except ImportError:
        raise RefusedError(
            "engine ray needs Ray. Install 'realign[pipeline,ray]' or use --engine process."
        ) from None
    if not ray.is_initialized():  # it stays for the next stage, and ends with this process
        ray.init(include_dashboard=False, log_to_driver=False, logging_level=logging.ERROR)
    logging.getLogger("ray.data").setLevel(logging.ERROR)
    context = ray.data.DataContext.get_current()
    context.enable_progress_bars = False
    context.print_on_execution_start = False
    cluster = ray.cluster_resources()
    gpus = int(cluster.get("GPU", 0))
    fitting = gpus or int(cluster.get("CPU", 1)) // threads
    rows = [{"number": number, "item": _Boxed(item)} for number, item in items.items()]
    results = ray.data.from_items(rows, override_num_blocks=len(rows)).map_batches(
        _Actor,
        fn_constructor_args=(task, threads),
        batch_size=1,
        compute=ray.data.ActorPoolStrategy(size=max(1, min(workers or fitting, len(items)))),
        num_cpus=threads,
        num_gpus=1 if gpus else 0,
    )
    for row in results.iter_rows():
        yield int(row["number"]), bytes(row["result"])


@dataclass(frozen=True)
class _Boxed:
    """Something that Arrow has no type for and carries as it is."""

    item: Any


class _Actor:
    """Opens the task once; called with batches of one item."""

    def __init__(self, task: Task, threads: int) -> None:
        import torch

        torch.set_num_threads(threads)
        self._work = task.open().__enter__()  # an actor ends when its process does

    def __call__(self, batch: dict[str, Any]) -> dict[str, Any]:
        results = [self._work(boxed.item) for boxed in batch["item"]]
        return {"number": batch["number"], "result": results}
