"""Limit the spinning of waiting OpenMP threads, which keeps cores from other processes."""

from __future__ import annotations

import os

# Less than a millisecond: longer than most pauses between two operations of a small model, shorter
# than the time slice of another process. GNU OpenMP's default of 300,000 suits only an idle
# machine.
SPIN_COUNT = "7000"


def limit_spinning() -> None:
    """Let waiting OpenMP threads sleep soon, unless the environment already sets how they wait.

    A thread that spins while it waits for others occupies a core that they need. OpenMP reads the
    environment when torch is loaded, so this affects a process that has not loaded torch yet, and
    the processes that it starts.
    """
    if not {"OMP_WAIT_POLICY", "GOMP_SPINCOUNT"} & os.environ.keys():
        os.environ["GOMP_SPINCOUNT"] = SPIN_COUNT
