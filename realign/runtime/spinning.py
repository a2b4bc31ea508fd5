"""Keeps OpenMP threads from spinning where other processes need the cores."""

from __future__ import annotations

import os

# Less than a millisecond: longer than most pauses between two operations of a small model, shorter
# than the slice that another process gets. GNU OpenMP's own 300,000 suit an idle machine only.
SPIN_COUNT = "7000"


def limit_spinning() -> None:
    """Have OpenMP threads sleep soon when they wait, unless the environment says how they wait.

    A thread that spins until the others arrive takes from them the core they need. The environment
    is read when torch is loaded: this works for a process that has not loaded it yet, and for those
    that this process starts.
    """
    if not {"OMP_WAIT_POLICY", "GOMP_SPINCOUNT"} & os.environ.keys():
        os.environ["GOMP_SPINCOUNT"] = SPIN_COUNT
