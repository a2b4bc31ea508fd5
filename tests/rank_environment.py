"""Processes of one group, and the environment by which they find each other."""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from tempfile import TemporaryFile

from tests.conftest import running
from tests.ports import free_port


def rank_environment(rank: int, num_ranks: int, port: int) -> dict[str, str]:
    """Return the variables that torchrun would set for a process."""
    return {
        "RANK": str(rank),
        "LOCAL_RANK": str(rank),
        "WORLD_SIZE": str(num_ranks),
        "LOCAL_WORLD_SIZE": str(num_ranks),
        "MASTER_ADDR": "127.0.0.1",
        "MASTER_PORT": str(port),
    }


@contextmanager
def ranks_of(num_ranks: int, *arguments: object) -> Iterator[None]:
    """Run Python with the same arguments as every rank of a group, as torchrun does.

    The body of the context runs meanwhile; at its end all processes must have succeeded.
    """
    environment = os.environ | {
        "PYTHONPATH": os.pathsep.join(filter(None, sys.path)),
        "OMP_NUM_THREADS": "1",
    }
    port = free_port()
    with ExitStack() as stack:
        # files, since a rank whose pipe nobody reads would block, and the others with it
        outputs = [stack.enter_context(TemporaryFile("w+")) for _ in range(num_ranks)]
        processes = [
            stack.enter_context(
                running(
                    [sys.executable, *arguments],
                    env=environment | rank_environment(rank, num_ranks, port),
                    stdout=subprocess.DEVNULL,
                    stderr=output,
                )
            )
            for rank, output in enumerate(outputs)
        ]
        yield
        for process in processes:
            process.wait(timeout=300)
        for output in outputs:
            output.seek(0)
        # checked together: a rank that fails makes the others fail too
        assert {process.returncode for process in processes} == {0}, "\n".join(
            output.read() for output in outputs
        )
