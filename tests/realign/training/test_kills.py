"""Training that is ended at random moments, resumed by the same call each time, and ends as a run
that nobody stopped: every byte of the model, the optimizer, the generators and the log.
"""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from functools import partial
from pathlib import Path
from typing import Any

import pytest
from torch.utils.data import DataLoader

from realign.data.formats.parquet import write_parquet
from realign.training.preemption import Preemption, ignore_signals
from tests.conftest import running

SCRIPT = Path(__file__).with_name("kill_runs.py")


def stop_runs(tmp_path: Path, records, model_dir: Path, **given: Any) -> dict[str, Any]:
    write_parquet(records(given.pop("rows", 12)), tmp_path / "data.parquet")
    options = {"batch_size": 2, "pairs_per_step": 4, "epochs": 2, "learning_rate": 1e-3}
    options |= {"logging_steps": 3, **given.pop("options")}
    argument = {
        "model": str(model_dir),
        "data": str(tmp_path / "data.parquet"),
        "folder": str(tmp_path),
        "seed": 0,
        "options": options,
        **given,
    }
    ended = subprocess.run(
        [sys.executable, SCRIPT, json.dumps(argument)],
        capture_output=True,
        env={**os.environ, "OMP_NUM_THREADS": "1"},
        check=False,
    )
    assert ended.returncode == 0, ended.stderr.decode()
    result: dict[str, Any] = json.loads(ended.stdout.splitlines()[-1])
    print(result)  # noqa: T201 - shown by -rP
    assert result["differ"] == []
    assert result["equal"] == result["runs"] >= 1
    assert result["stopped"] >= given["count"]
    return result


def test_a_run_ended_by_kill_9_resumes_exactly(tmp_path: Path, records, model_dir: Path) -> None:
    stop_runs(
        tmp_path, records, model_dir, count=2, rows=8, signal="SIGKILL", options={"save_steps": 1}
    )


@pytest.mark.slow
@pytest.mark.parametrize("save_steps", [1, 3])
def test_runs_killed_at_many_moments_resume_exactly(
    tmp_path: Path, records, model_dir: Path, save_steps
) -> None:
    """REALIGN_KILLS=100 gives the full count."""
    count = int(os.environ.get("REALIGN_KILLS", "20"))
    options = {"save_steps": save_steps}
    stop_runs(tmp_path, records, model_dir, count=count, signal="SIGKILL", seed=1, options=options)


@pytest.mark.slow
def test_runs_terminated_at_many_moments_resume_exactly(
    tmp_path: Path, records, model_dir: Path
) -> None:
    """Checkpoints are saved only on SIGTERM, mostly in the middle of an accumulation."""
    count = int(os.environ.get("REALIGN_KILLS", "20")) // 2
    options = {"save_steps": 4, "pairs_per_step": 4, "batch_size": 1}
    result = stop_runs(
        tmp_path, records, model_dir, count=count, signal="SIGTERM", seed=2, options=options
    )
    assert result["slowest exit"] < 30


def test_data_workers_ignore_sigterm_until_the_trainer_has_saved() -> None:
    """A scheduler may signal all of a process group."""
    with Preemption() as asked:
        ignore = partial(ignore_signals, None, asked.is_waited_for)
        iterator: Any = iter(DataLoader([*range(20)], num_workers=2, worker_init_fn=ignore))
        seen = [next(iterator), next(iterator)]  # one of each worker
        for worker in iterator._workers:
            os.kill(worker.pid, signal.SIGTERM)
        assert len([*seen, *iterator]) == 20


@pytest.mark.parametrize("is_persistent", [False, pytest.param(True, marks=pytest.mark.full)])
def test_data_workers_end_with_a_failed_run(is_persistent: bool) -> None:
    """The run fails in the middle of an epoch, and its traceback still refers to the workers."""
    code = (
        "from functools import partial\n"
        "from torch.utils.data import DataLoader\n"
        "from realign.training.preemption import Preemption, ignore_signals\n"
        "with Preemption() as asked:\n"
        "    ignore = partial(ignore_signals, None, asked.is_waited_for)\n"
        "    batches = iter(DataLoader([*range(20)], num_workers=2, worker_init_fn=ignore,\n"
        f"                   persistent_workers={is_persistent}))\n"
        "    next(batches), 1 / 0\n"
    )
    process = subprocess.run([sys.executable, "-c", code], capture_output=True, timeout=300)
    assert process.returncode == 1
    assert b"ZeroDivisionError" in process.stderr


def test_a_duplicated_sigterm_counts_once() -> None:
    with Preemption() as asked:
        for _ in range(2):  # from the scheduler, and from the launcher that it told too
            os.kill(os.getpid(), signal.SIGTERM)
    assert asked.is_requested


def test_a_second_sigterm_ends_the_run_at_once() -> None:
    code = (
        "import time\n"
        "from realign.training import preemption\n"
        "from realign.training.preemption import Preemption\n"
        "preemption.SECONDS_OF_ONE = 0.2\n"
        "with Preemption() as asked:\n"
        "    print('ready', flush=True)\n"
        "    while not asked.is_requested: time.sleep(0.01)\n"
        "    time.sleep(0.4)\n"
        "    print('asked', flush=True)\n"
        "    time.sleep(60)\n"
    )
    command = [sys.executable, "-c", code]
    with running(command, stdout=subprocess.PIPE, text=True) as process:
        assert process.stdout is not None
        for line in ("ready\n", "asked\n"):
            assert process.stdout.readline() == line
            assert process.poll() is None
            process.send_signal(signal.SIGTERM)
        started = time.monotonic()
        assert process.wait() == 143
        assert time.monotonic() - started < 30  # half of what it would sleep
