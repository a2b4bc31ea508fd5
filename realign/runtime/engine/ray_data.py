"""Tasks on a Ray cluster with Ray Data: the one that RAY_ADDRESS names, or a local one.

Models and images must have the same path on every node; results return to the driver, which alone
writes.
"""

from __future__ import annotations

import logging
import os
import signal
import threading
import warnings
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from importlib.util import find_spec
from itertools import islice
from typing import Any

from realign.errors import RefusedError
from realign.runtime.engine.task import REMEDY, Task, WorkerError, portable_error
from realign.runtime.spinning import limit_spinning

# How often an actor that died is started again, and a shard is tried again. Ray Data's default is
# for ever, which a shard that is too large for memory would take.
RETRIES = 3
# Shards that an actor makes before all actors are restarted. Only so many items exist at once;
# loading a model takes little time beside so much work.
SHARDS_AN_ACTOR = 64


def require_ray() -> None:
    """Refuse, before any work, to run without Ray.

    Raises:
        RefusedError: Ray is not installed.
    """
    if find_spec("ray") is None:
        raise RefusedError(
            "engine ray requires Ray, which is not installed. Install 'realign[pipeline,ray]', or "
            "use --engine process."
        )


def run_on_ray(
    task: Task, items: Mapping[int, Any], workers: int | None, threads: int, worker_bytes: int
) -> Iterator[tuple[int, bytes]]:
    """Yield the number and result of every item when it is done, in any order.

    Args:
        task: Task to run.
        items: Items by their number.
        workers: Number of actors; None is one per GPU of the cluster, or as many as its cores and
            memory allow.
        threads: CPU threads per actor.
        worker_bytes: Memory that an actor needs, to choose their number.
    Raises:
        RefusedError: Ray is not installed, or the task refused its input.
        WorkerError: Actors died repeatedly.
        RuntimeError: The task failed; the message has its traceback.
    """
    require_ray()
    os.environ.setdefault("RAY_USAGE_STATS_ENABLED", "0")
    # it would print as an error that restarting an actor needs the arguments it was made with
    os.environ.setdefault("RAY_BACKEND_LOG_LEVEL", "fatal")
    import ray
    import ray.data

    if not ray.is_initialized():  # it stays for the next stage, and ends with this process
        _start()
    logging.getLogger("ray.data").setLevel(logging.ERROR)
    context = ray.data.DataContext.get_current()
    context.enable_progress_bars = False
    context.print_on_execution_start = False
    cluster = ray.cluster_resources()
    gpus = int(cluster.get("GPU", 0))
    actors = workers or gpus or _fitting(cluster, threads, worker_bytes)
    actors = max(1, min(actors, len(items)))
    waiting = iter(items.items())
    while some := dict(islice(waiting, actors * SHARDS_AN_ACTOR)):
        yield from _run_at_once(task, some, actors, threads, bool(gpus))


def _start() -> None:
    """Start or join a cluster. Ray puts its own handler of SIGTERM over the command line's, which
    has another exit code.
    """
    import ray

    before = signal.getsignal(signal.SIGTERM)
    limit_spinning()
    ray.init(include_dashboard=False, log_to_driver=False, logging_level=logging.ERROR)
    if callable(before) and threading.current_thread() is threading.main_thread():
        signal.signal(signal.SIGTERM, before)


def _fitting(cluster: Mapping[str, float], threads: int, worker_bytes: int) -> int:
    """Return the number of actors that fit a cluster without GPUs, by cores and memory."""
    cores = int(cluster.get("CPU", 1)) // threads
    return min(cores, int(cluster.get("memory", 0)) // worker_bytes) if worker_bytes else cores


def _run_at_once(
    task: Task, items: Mapping[int, Any], actors: int, threads: int, has_gpus: bool
) -> Iterator[tuple[int, bytes]]:
    """Run one execution of Ray Data, which starts and ends its actors."""
    import ray
    import ray.data

    rows = [{"number": number, "item": _Boxed(item)} for number, item in items.items()]
    with warnings.catch_warnings():
        # Ray 2.60 names no others for the two limits; they go in 2.64
        warnings.filterwarnings("ignore", "`ray_remote_args` is deprecated")
        results = ray.data.from_items(rows, override_num_blocks=len(rows)).map_batches(
            _Actor,
            fn_constructor_args=(task, threads),
            batch_size=1,
            compute=ray.data.ActorPoolStrategy(size=min(actors, len(items))),
            num_cpus=threads,
            num_gpus=1 if has_gpus else 0,
            max_restarts=RETRIES,
            max_task_retries=RETRIES,
        )
    left = dict.fromkeys(items)
    try:
        for row in results.iter_rows():
            if row["error"].value is not None:
                raise row["error"].value
            number = int(row["number"])
            del left[number]
            yield number, bytes(row["result"])
    except ray.exceptions.RayError as error:
        raise WorkerError(
            f"Ray gave up at shard {next(iter(left))} or at one soon after it; an actor that dies "
            f"is started again {RETRIES} times. {REMEDY} Ray said: {error}"
        ) from error


@dataclass(frozen=True)
class _Boxed:
    """A value that Arrow has no type for and carries unchanged."""

    value: Any


class _Actor:
    """Actor that opens the task once and is called with batches of one item. An error is returned
    as a result: if it was raised here, Ray would retry it and raise another one in the driver.
    """

    def __init__(self, task: Task, threads: int) -> None:
        import torch

        torch.set_num_threads(threads)
        self._problem: Exception | None = None
        try:
            self._context = task.open()  # kept: what it holds is let go of with it
            self._work = self._context.__enter__()  # an actor ends when its process does
        except Exception as error:  # the driver raises it
            self._problem = portable_error(error)

    def __call__(self, batch: dict[str, Any]) -> dict[str, Any]:
        (boxed,) = batch["item"]
        result, problem = b"", self._problem
        if problem is None:
            try:
                result = self._work(boxed.value)
            except Exception as error:  # the driver raises it
                problem = portable_error(error)
        return {"number": batch["number"], "result": [result], "error": [_Boxed(problem)]}
