"""Limit on the spinning of OpenMP threads, for cores that other processes need."""

from __future__ import annotations

import os

# Less than a millisecond: longer than most pauses between two operations of a small model, shorter
# than the time slice of another process. GNU OpenMP's default of 300,000 suits only an idle
# machine.
SPIN_COUNT = "7000"


def limit_spinning() -> None:
    """Let OpenMP threads sleep soon when they wait, unless the environment sets how they wait.

    A thread that spins until the others arrive takes the core that they need. The environment is
    read when torch is loaded: this works for a process that has not loaded it yet, and for those
    that this process starts.
    """
    if not {"OMP_WAIT_POLICY", "GOMP_SPINCOUNT"} & os.environ.keys():
        os.environ["GOMP_SPINCOUNT"] = SPIN_COUNT
