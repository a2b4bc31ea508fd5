"""Engines give every item to a worker once, wherever it runs, and report errors."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from textwrap import dedent

import pytest
import torch

from realign.errors import RefusedError
from realign.runtime.engine.engine import Engine, fill_shards
from realign.runtime.engine.processes import run_in_processes
from realign.runtime.engine.task import WorkerError
from realign.runtime.memory import usable_cores, usable_memory
from tests.conftest import running
from tests.processes import is_running, wait_until


@dataclass(frozen=True)
class Squares:
    """Writes the item's square, the worker and its threads; what ``trouble`` says at item 3."""

    trouble: str = ""

    @contextmanager
    def open(self) -> Iterator[Callable[[int], bytes]]:
        if self.trouble == "open":
            raise RefusedError("cannot open")

        def work(item: int) -> bytes:
            if item == 3 and self.trouble == "raise":
                raise RefusedError("item 3 is bad")
            if item == 3 and self.trouble == "die":
                os.kill(os.getpid(), signal.SIGKILL)
            return f"{item * item} {os.getpid()} {torch.get_num_threads()}".encode()

        yield work


@pytest.mark.parametrize("workers", [1, 2, pytest.param(3, marks=pytest.mark.full)])
def test_every_item_is_processed_once_with_one_thread(workers: int) -> None:
    results = dict(Engine(workers=workers).run(Squares(), {i: i for i in range(7)}))
    assert {number: int(result.split()[0]) for number, result in results.items()} == {
        i: i * i for i in range(7)
    }
    assert {result.split()[2] for result in results.values()} == {b"1"}
    pids = {int(result.split()[1]) for result in results.values()}
    assert (pids == {os.getpid()}) == (workers == 1)
    assert len(pids) <= workers


@pytest.mark.parametrize("workers", [1, pytest.param(2, marks=pytest.mark.full)])
@pytest.mark.parametrize(
    ("trouble", "message"), [("open", "cannot open"), ("raise", "item 3 is bad")]
)
def test_an_error_of_a_task_is_raised_in_the_caller(
    workers: int, trouble: str, message: str
) -> None:
    with pytest.raises(RefusedError, match=message):
        list(Engine(workers=workers).run(Squares(trouble), {i: i for i in range(6)}))


def test_a_worker_that_dies_is_reported_with_its_shard_and_results_are_kept(
    tmp_path: Path,
) -> None:
    paths = {i: tmp_path / f"{i}.txt" for i in range(6)}
    with pytest.raises(WorkerError, match=r"signal SIGKILL at shard 3\..*run the same command"):
        fill_shards(
            "squares",
            paths,
            dict.fromkeys(paths, 1),
            lambda i: i,
            Squares("die"),
            Engine(workers=2),
        )
    assert not paths[3].exists()
    assert paths[0].exists() or paths[1].exists()
    kept = {path: path.read_bytes() for path in paths.values() if path.exists()}
    fill_shards(
        "squares", paths, dict.fromkeys(paths, 1), lambda i: i, Squares(), Engine(workers=2)
    )
    assert [int(paths[i].read_text().split()[0]) for i in range(6)] == [0, 1, 4, 9, 16, 25]
    assert all(path.read_bytes() == content for path, content in kept.items())


def test_no_worker_starts_when_no_shard_is_missing(tmp_path: Path) -> None:
    (tmp_path / "0").write_bytes(b"there")
    fill_shards("none", {0: tmp_path / "0"}, {0: 1}, lambda i: i, Squares("open"), Engine())


@dataclass(frozen=True)
class Dies:
    """Kills its worker while it opens, or meets an end of file, or says how large an item is."""

    when: str

    @contextmanager
    def open(self) -> Iterator[Callable[[bytes], bytes]]:
        if self.when == "open":
            os.kill(os.getpid(), signal.SIGKILL)

        def work(item: bytes) -> bytes:
            if self.when == "end of file":
                raise EOFError("a file that is cut")
            return str(len(item)).encode()

        yield work


def test_a_worker_that_dies_while_opening_its_task_is_reported() -> None:
    """Items are larger than a pipe holds: none is sent to a worker that does not read."""
    items = {0: bytes(5 << 20), 1: bytes(5 << 20)}
    with pytest.raises(WorkerError, match=r"SIGKILL before its first shard\..*fewer workers"):
        list(run_in_processes(Dies("open"), items, [{}, {}], 1))


@pytest.mark.full
def test_items_and_results_may_be_larger_than_a_pipe() -> None:
    items = {i: bytes(5 << 20) for i in range(4)}
    results = dict(run_in_processes(Dies("never"), items, [{}, {}], 1))
    assert results == dict.fromkeys(range(4), str(5 << 20).encode())


def test_an_eof_error_raised_by_a_task_is_reported_as_its_error() -> None:
    with pytest.raises(RuntimeError, match="EOFError: a file that is cut"):
        list(run_in_processes(Dies("end of file"), {0: b"", 1: b""}, [{}, {}], 1))


@pytest.mark.full
def test_a_script_without_a_main_guard_is_refused(tmp_path: Path) -> None:
    script = tmp_path / "unguarded.py"
    script.write_text(dedent(SLEEPERS).partition("if __name__")[0] + UNGUARDED)
    ended = subprocess.run(
        [sys.executable, str(script)], capture_output=True, text=True, timeout=120
    )
    assert ended.returncode == 1
    last = ended.stderr.strip().splitlines()[-1]
    assert "WorkerError: A worker ended by exit code 1 before its first shard." in last
    assert "must do so below `if __name__ == '__main__':`" in last


UNGUARDED = 'list(Engine(workers=2).run(Sleep("."), {0: bytes(5 << 20), 1: b""}))\n'


def test_the_number_of_workers_is_limited_by_memory_and_cores() -> None:
    assert Engine(worker_bytes=1 << 60)._fitting() == 1
    assert Engine()._fitting() == usable_cores()
    assert Engine(worker_bytes=usable_memory() // 2)._fitting() == 1
    if hasattr(os, "sched_setaffinity"):
        cores = os.sched_getaffinity(0)
        try:
            os.sched_setaffinity(0, {min(cores)})
            assert Engine()._fitting() == 1
        finally:
            os.sched_setaffinity(0, cores)


def fill(paths: dict[int, Path], task: Squares) -> None:
    fill_shards("squares", paths, dict.fromkeys(paths, 1), lambda i: i, task, Engine(workers=2))


SLEEPERS = """
    import time
    from collections.abc import Callable, Iterator
    from contextlib import contextmanager
    from dataclasses import dataclass

    from realign.runtime.engine.engine import Engine

    @dataclass(frozen=True)
    class Sleep:
        folder: str

        @contextmanager
        def open(self) -> Iterator[Callable[[int], bytes]]:
            import os
            from pathlib import Path

            (Path(self.folder) / str(os.getpid())).touch()
            yield lambda item: time.sleep(600) or b""

    if __name__ == "__main__":
        list(Engine(workers=2).run(Sleep("FOLDER"), {0: 0, 1: 1}))
"""


@pytest.mark.parametrize(
    "sent", [signal.SIGKILL, pytest.param(signal.SIGTERM, marks=pytest.mark.full)]
)
def test_workers_end_with_their_parent(tmp_path: Path, sent: signal.Signals) -> None:
    script, pids = tmp_path / "sleepers.py", tmp_path / "pids"
    pids.mkdir()
    script.write_text(dedent(SLEEPERS).replace("FOLDER", str(pids)))
    with running([sys.executable, script]) as parent:
        wait_until(lambda: len(list(pids.iterdir())) == 2)
        parent.send_signal(sent)
        parent.wait(timeout=120)
    wait_until(lambda: not any(is_running(int(path.name)) for path in pids.iterdir()))
