"""Runs a task in processes of this machine, one a GPU or several a CPU.

A worker that dies is an error that names its shard; workers end when the parent does, however it
does.
"""

from __future__ import annotations

import multiprocessing
import os
import signal
import threading
import traceback
from collections.abc import Iterator, Mapping, Sequence
from multiprocessing.connection import Connection, wait
from typing import Any

from realign.engine.task import Task
from realign.errors import RefusedError

END_SECONDS = 10.0


class WorkerError(RuntimeError):
    """A worker process died without a word: killed, or out of memory."""


def run_in_processes(
    task: Task, items: Mapping[int, Any], environments: Sequence[Mapping[str, str]], threads: int
) -> Iterator[tuple[int, bytes]]:
    """Yield the number and result of every item as they get done, in any order.

    Args:
        task: What is done.
        items: Number to item.
        environments: One a worker: variables that it sets before it opens the task.
        threads: CPU threads a worker.
    Raises:
        WorkerError: A worker died.
        RefusedError: The task refused its input.
        RuntimeError: The task failed; the message has its traceback.
    """
    context = multiprocessing.get_context("spawn")
    waiting = iter(items.items())
    busy: dict[Connection, int] = {}
    processes: dict[Connection, Any] = {}
    try:
        for environment in environments[: len(items)]:
            ours, theirs = context.Pipe()
            process = context.Process(
                target=_serve, args=(task, theirs, dict(environment), threads), daemon=True
            )
            process.start()
            theirs.close()  # so that its end shows here
            processes[ours] = process
            _hand_out(ours, waiting, busy)
        while busy:
            for ready in wait([*busy]):
                assert isinstance(ready, Connection)
                number = busy.pop(ready)
                try:
                    result, error = ready.recv()
                except EOFError:
                    raise WorkerError(_obituary(processes[ready], number)) from None
                if error is not None:
                    raise error
                yield number, result
                _hand_out(ready, waiting, busy)
        for connection, process in processes.items():
            connection.close()  # with nothing left to read, a worker ends by itself
            process.join(END_SECONDS)
    finally:
        for connection, process in processes.items():
            process.kill()
            process.join()
            connection.close()


def _hand_out(
    worker: Connection, waiting: Iterator[tuple[int, Any]], busy: dict[Connection, int]
) -> None:
    if following := next(waiting, None):
        number, item = following
        busy[worker] = number
        # a worker that is dead already is noticed when its answer is read
        try:
            worker.send(item)
        except BrokenPipeError:
            return


def _obituary(process: Any, number: int) -> str:
    process.join()
    code = process.exitcode
    cause = f"signal {signal.Signals(-code).name}" if code < 0 else f"exit code {code}"
    return (
        f"A worker ended by {cause} at shard {number}. If it was SIGKILL, memory ran out: use "
        "fewer workers or smaller batches. A script that calls this must do so below `if __name__ "
        "== '__main__':`. Finished shards are kept; run the same command again."
    )


def _serve(task: Task, parent: Connection, environment: dict[str, str], threads: int) -> None:
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # the parent decides
    os.environ.update(environment)
    threading.Thread(target=_end_with_parent, daemon=True).start()
    import torch

    torch.set_num_threads(threads)
    try:
        with task.open() as work:
            while True:
                parent.send((work(parent.recv()), None))
    except EOFError:
        return  # the parent closed its end
    except Exception as error:
        parent.send((None, _told(error)))


def _end_with_parent() -> None:
    parent = multiprocessing.parent_process()
    assert parent is not None
    parent.join()
    os._exit(1)


def _told(error: Exception) -> Exception:
    """The error as the parent raises it: others than ours may not survive the way."""
    if isinstance(error, RefusedError):
        return error
    lines = "".join(traceback.format_exception(error))
    return RuntimeError(f"A worker failed:\n{lines}")
