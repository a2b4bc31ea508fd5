"""Ray reports errors of an actor as other engines do, and makes a limited number of items at once.

What needs Ray is in one process of its own: Ray warns about itself when it is imported, and
starting it and its actors is what takes the time.
"""

from __future__ import annotations

import gc
import json
import signal
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from textwrap import dedent

import pytest
import torch

from realign.errors import RefusedError
from realign.runtime.engine.ray_data import _Actor, _Boxed, _fitting
from tests.conftest import running
from tests.processes import wait_until

TROUBLES = """
    import json
    import os
    import signal
    import sys
    import time
    from collections.abc import Callable, Iterator
    from contextlib import contextmanager
    from dataclasses import dataclass
    from pathlib import Path

    from realign.runtime.engine import ray_data
    from realign.runtime.engine.engine import Engine, LazyItems
    from realign.errors import RefusedError

    folder = Path(sys.argv[1])

    @dataclass(frozen=True)
    class Trouble:
        kind: str
        folder: Path

        @contextmanager
        def open(self) -> Iterator[Callable[[int], bytes]]:
            if self.kind == "open":
                raise RefusedError("cannot open", code="closed")

            def work(item: int) -> bytes:
                if item == 2 and self.kind == "refuse":
                    raise RefusedError("item 2 is bad", field="answer")
                if item == 1 and self.kind == "fail":
                    raise KeyError("a key")
                if item == 1 and self.kind == "die":
                    with (self.folder / "deaths").open("a") as deaths:
                        deaths.write("x")
                    os.kill(os.getpid(), signal.SIGKILL)
                if self.kind == "sleep":
                    (self.folder / "pid").write_text(str(os.getpid()))
                    time.sleep(600)
                return str(item * item).encode()

            try:
                yield work
            finally:
                (self.folder / f"closed {self.kind}").touch()

    def tell(kind: str) -> dict[str, object]:
        made, done = [], []

        def make(number: int) -> int:
            made.append(number)
            return number

        engine = Engine("ray", workers=1)
        try:
            for number, result in engine.run(Trouble(kind, folder), LazyItems(range(3), make)):
                done.append([number, result.decode(), len(made)])
        except Exception as error:
            details = {"type": type(error).__name__, "message": str(error), **vars(error)}
            return {"done": done, "made": made, "error": details}
        return {"done": done, "made": made}

    if __name__ == "__main__":
        ray_data.SHARDS_AN_ACTOR = 2
        ray_data.RETRIES = 1
        signal.signal(signal.SIGTERM, lambda *_: sys.exit(143))
        reports = {kind: tell(kind) for kind in ("refuse", "open", "fail", "die")}
        (folder / "told.json").write_text(json.dumps(reports))
        tell("sleep")
"""


@pytest.mark.slow
def test_ray_errors_are_reported_as_by_other_engines(tmp_path: Path) -> None:
    script = tmp_path / "troubles.py"
    script.write_text(dedent(TROUBLES))
    # the one warning that is ours to answer for
    strict = ("-W", "error:`ray_remote_args`")
    with running([sys.executable, *strict, script, tmp_path]) as process:
        wait_until(lambda: (tmp_path / "pid").is_file() or process.poll() is not None, 300)
        process.send_signal(signal.SIGTERM)
        assert process.wait(timeout=60) == 143  # the script's handler, not Ray's
    actor = int((tmp_path / "pid").read_text())
    wait_until(lambda: not Path(f"/proc/{actor}").exists(), 60)

    reports = json.loads((tmp_path / "told.json").read_text())
    # two shards an execution: the third item is made when the first two are done
    assert sorted(reports["refuse"]["done"]) == [[0, "0", 2], [1, "1", 2]]
    assert reports["refuse"]["made"] == [0, 1, 2]
    assert reports["refuse"]["error"] == {
        "type": "RefusedError",
        "message": "item 2 is bad",
        "code": "refused",
        "field": "answer",
        "missing": "",
    }
    assert reports["open"]["error"] == {
        "type": "RefusedError",
        "message": "cannot open",
        "code": "closed",
        "field": "",
        "missing": "",
    }
    assert reports["fail"]["error"]["type"] == "RuntimeError"
    assert reports["fail"]["error"]["message"].endswith("KeyError: 'a key'\n")
    assert reports["die"]["error"]["type"] == "WorkerError"
    first = {number for number, *_ in reports["die"]["done"]}
    assert (
        f"Ray gave up at shard {int(0 in first)} or at one soon after it; an actor that dies is "
        "started again 1 times. If it was SIGKILL, memory ran out: use fewer workers"
    ) in reports["die"]["error"]["message"]
    assert (tmp_path / "deaths").read_text() == "xx"


@dataclass(frozen=True)
class Half:
    """Works while its context is open, with odd numbers refused."""

    is_shut: bool = False

    @contextmanager
    def open(self) -> Iterator[Callable[[int], bytes]]:
        if self.is_shut:
            raise RefusedError("cannot open")
        opened = [True]

        def work(item: int) -> bytes:
            if item % 2:
                raise RefusedError(f"{item} is odd", code="odd")
            return f"{item // 2} {opened}".encode()

        try:
            yield work
        finally:
            opened.clear()


def test_an_actor_keeps_its_task_open() -> None:
    actor = _Actor(Half(), torch.get_num_threads())
    gc.collect()
    batch = actor({"number": [7], "item": [_Boxed(4)]})
    assert batch == {"number": [7], "result": [b"2 [True]"], "error": [_Boxed(None)]}


def test_an_actor_returns_an_error_instead_of_raising_it() -> None:
    batch = _Actor(Half(), torch.get_num_threads())({"number": [7], "item": [_Boxed(3)]})
    refused = batch["error"][0].value
    assert (type(refused), str(refused), refused.code) == (RefusedError, "3 is odd", "odd")
    shut = _Actor(Half(is_shut=True), torch.get_num_threads())
    for number in (0, 1):
        batch = shut({"number": [number], "item": [_Boxed(2)]})
        assert (batch["number"], batch["result"]) == ([number], [b""])
        assert str(batch["error"][0].value) == "cannot open"


def test_the_number_of_actors_is_limited_by_cluster_cores_and_memory() -> None:
    cluster = {"CPU": 8.0, "memory": 10.0e9}
    assert _fitting(cluster, threads=2, worker_bytes=0) == 4
    assert _fitting(cluster, threads=1, worker_bytes=3_000_000_000) == 3
