"""Processes that train in turn, within a limit of time."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import tempfile
import threading
import time
from contextlib import ExitStack, suppress
from dataclasses import asdict
from typing import Any

from benchmarks.result_files import RESULTS
from benchmarks.step.setup import Job

Cells = dict[str, dict[str, Any]]

_OUT_OF_TIME = {"status": "not measured", "reason": "out of time"}


class Worker:
    """A process that trains when it gets a turn."""

    def __init__(self, job: Job) -> None:
        # closed with the process
        self._log = tempfile.TemporaryFile(mode="w+")  # noqa: SIM115
        self._process = subprocess.Popen(
            [sys.executable, "-m", "benchmarks.step.worker", json.dumps(asdict(job))],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=self._log,
            text=True,
            cwd=RESULTS.parents[1],
            env={**os.environ, "OMP_NUM_THREADS": str(job.threads)},
        )

    def __enter__(self) -> Worker:
        return self

    def __exit__(self, *_: object) -> None:
        self._process.kill()
        self._process.wait()
        for pipe in (self._process.stdin, self._process.stdout):
            if pipe is not None:
                with suppress(BrokenPipeError):
                    pipe.close()
        self._log.close()

    def read(self) -> dict[str, Any]:
        """Return the next line; the first one may say why the job is ``unavailable``.

        Raises:
            RuntimeError: The process ended; with the last line that it wrote.
        """
        assert self._process.stdout is not None
        if text := self._process.stdout.readline():
            return json.loads(text)
        self._process.wait()
        self._log.seek(0)
        lines = [line.strip() for line in self._log if line.strip()] or ["it said nothing"]
        raise RuntimeError(lines[-1][:300])

    def stop(self) -> None:
        """End the process at once."""
        self._process.kill()

    def turn(self, steps: int) -> dict[str, Any]:
        """Let the process train some steps, and return its line about them."""
        assert self._process.stdin is not None
        with suppress(BrokenPipeError):  # read() says why it ended
            self._process.stdin.write(f"{steps}\n")
            self._process.stdin.flush()
        return self.read()


def run_jobs(
    jobs: dict[str, Job], repeats: int, warm_steps: int, *, seconds: float = float("inf")
) -> Cells:
    """Measure schemes in turn, one step per turn.

    On a GPU a turn has one more step, which is not timed, since idle processes have freed their
    memory.

    Args:
        jobs: The jobs by contender.
        repeats: Turns of each contender.
        warm_steps: Steps before the first turn.
        seconds: Time after which no turn begins and processes that still work are ended; contenders
            that have had a turn keep their measurements.
    """
    deadline = time.monotonic() + seconds
    cells: Cells = {}
    if seconds <= 0:
        return {name: dict(_OUT_OF_TIME) for name in jobs}
    with ExitStack() as stack:
        workers = {name: stack.enter_context(Worker(job)) for name, job in jobs.items()}
        if seconds < threading.TIMEOUT_MAX:
            alarm = threading.Timer(seconds, lambda: [w.stop() for w in [*workers.values()]])
            alarm.start()
            stack.callback(alarm.cancel)

        def fail(name: str, error: Exception) -> None:
            is_over = time.monotonic() >= deadline
            del workers[name]
            if is_over and cells.get(name, {}).get("seconds"):
                return  # what was measured stays
            reason = {"status": "failed", "reason": str(error)}
            cells[name] = dict(_OUT_OF_TIME) if is_over else reason

        for name, worker in list(workers.items()):
            try:
                found = worker.read()
                if reason := found.get("unavailable"):
                    cells[name] = {"status": "unavailable", "reason": reason}
                    del workers[name]
                    continue
                lists: dict[str, Any] = {"seconds": [], "cpu_seconds": [], "losses": []}
                cells[name] = {"status": "ok", **found, **lists}
                _take_turn(worker, cells[name], warm_steps, counts=False)
            except RuntimeError as error:
                fail(name, error)
        for repeat in range(repeats):
            order = list(workers)
            for name in order if repeat % 2 else reversed(order):
                if time.monotonic() >= deadline:
                    break
                steps = steps_of_a_turn(jobs[name].device)
                try:
                    _take_turn(workers[name], cells[name], steps, counts=True)
                except RuntimeError as error:
                    fail(name, error)
        for name, worker in list(workers.items()):
            if not cells[name]["seconds"]:
                cells[name] = dict(_OUT_OF_TIME)
            elif jobs[name].profile and time.monotonic() < deadline:
                try:
                    worker.turn(steps_of_a_turn(jobs[name].device))  # the last one is recorded
                except RuntimeError as error:  # what was measured stays
                    print(f"no profile of {name}: {error}", file=sys.stderr)
    return cells


def steps_of_a_turn(device: str) -> int:
    """Return the steps of a turn, of which the last counts: on a GPU the first claims memory."""
    return 2 if device == "cuda" else 1


def _take_turn(worker: Worker, cell: dict[str, Any], steps: int, *, counts: bool) -> None:
    if not steps:
        return
    found = worker.turn(steps)
    cell["losses"] += found["losses"]
    cell["peak_bytes"] = max(cell.get("peak_bytes", 0), found["peak_bytes"])
    if counts:
        for name in ("seconds", "cpu_seconds"):
            cell[name].append(found[name][-1])
