"""Run tasks in processes on this machine: one per GPU, or several on the CPU.

If a worker dies, an error names its shard. Workers end with their parent, even if it is killed.
"""

from __future__ import annotations

import multiprocessing
import os
import signal
import threading
from collections.abc import Iterator, Mapping, Sequence
from multiprocessing.connection import Connection, wait
from typing import Any

from realign.runtime.engine.task import REMEDY, Task, WorkerError, portable_error
from realign.runtime.spinning import limit_spinning

END_SECONDS = 10.0


def run_in_processes(
    task: Task, items: Mapping[int, Any], environments: Sequence[Mapping[str, str]], threads: int
) -> Iterator[tuple[int, bytes]]:
    """Yield the number and result of every item when it is done, in any order.

    Args:
        task: Task to run.
        items: Items by their number.
        environments: Environment variables of each worker, set before it opens the task.
        threads: CPU threads per worker.
    Raises:
        WorkerError: A worker died.
        RefusedError: The task refused its input.
        RuntimeError: The task failed; the message has its traceback.
    """
    limit_spinning()
    context = multiprocessing.get_context("spawn")
    waiting = iter(items.items())
    left = len(items)
    # number of each busy worker's item; None while it opens the task
    busy: dict[Connection, int | None] = {}
    processes: dict[Connection, Any] = {}
    try:
        for environment in environments[: len(items)]:
            ours, theirs = context.Pipe()
            process = context.Process(
                target=_serve, args=(task, theirs, dict(environment), threads), daemon=True
            )
            process.start()
            theirs.close()  # so that the parent sees when the worker's end closes
            processes[ours] = process
            busy[ours] = None
        while left:
            for ready in wait([*busy]):
                assert isinstance(ready, Connection)
                number = busy.pop(ready)
                try:
                    result, error = ready.recv()
                except (EOFError, OSError):  # before, or in the middle of, an answer
                    raise WorkerError(_death_message(processes[ready], number)) from None
                if error is not None:
                    raise error
                if number is not None:
                    left -= 1
                    yield number, result
                _hand_out(ready, waiting, busy)
        # idle workers end when their connection closes; one that still opens its task is killed
        idle = [connection for connection in processes if connection not in busy]
        for connection in idle:
            connection.close()
        for connection in idle:
            processes[connection].join(END_SECONDS)
    finally:
        for connection, process in processes.items():
            process.kill()
            process.join()
            connection.close()


def _hand_out(
    worker: Connection, waiting: Iterator[tuple[int, Any]], busy: dict[Connection, int | None]
) -> None:
    """Send a waiting worker its next item."""
    if following := next(waiting, None):
        number, item = following
        busy[worker] = number
        # a worker that has already died is noticed when its answer is read
        try:
            worker.send(item)
        except (BrokenPipeError, ConnectionResetError):
            return


def _death_message(process: Any, number: int | None) -> str:
    process.join()
    code = process.exitcode
    cause = f"signal {signal.Signals(-code).name}" if code < 0 else f"exit code {code}"
    place = "before its first shard" if number is None else f"at shard {number}"
    return (
        f"A worker ended by {cause} {place}. A script that calls this must do so below `if "
        f"__name__ == '__main__':`. {REMEDY}"
    )


def _serve(task: Task, parent: Connection, environment: dict[str, str], threads: int) -> None:
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C is handled by the parent
    os.environ.update(environment)
    threading.Thread(target=_end_with_parent, daemon=True).start()
    import torch

    torch.set_num_threads(threads)
    try:
        with task.open() as work:
            parent.send((None, None))  # ready
            for item in _received(parent):
                parent.send((work(item), None))
    except Exception as error:  # sent to the parent, which raises it
        parent.send((None, portable_error(error)))


def _received(parent: Connection) -> Iterator[Any]:
    """Yield items until the parent closes its end."""
    while True:
        try:
            item = parent.recv()
        except (EOFError, ConnectionResetError):
            return
        yield item


def _end_with_parent() -> None:
    parent = multiprocessing.parent_process()
    assert parent is not None
    parent.join()
    os._exit(1)
