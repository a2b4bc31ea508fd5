"""Exact log-probabilities of tokens from hidden states, and preference losses on top of them.

This package requires torch only.
"""

from __future__ import annotations

from realign_kernels.backends.dispatch import describe_backends
from realign_kernels.cells import stack_cells
from realign_kernels.diagnosis import diagnose
from realign_kernels.installation import __version__ as __version__
from realign_kernels.labels import shift_labels
from realign_kernels.linear_logprob import LogprobStats, linear_logprob, linear_logprob_stats
from realign_kernels.objective import (
    CELL_NAMES,
    Objective,
    PreferenceOutput,
    Term,
    preference_loss,
)
from realign_kernels.rdpo_loss import RdpoOutput, RdpoStatsOutput, rdpo_loss

__all__ = [
    "CELL_NAMES",
    "LogprobStats",
    "Objective",
    "PreferenceOutput",
    "RdpoOutput",
    "RdpoStatsOutput",
    "Term",
    "describe_backends",
    "diagnose",
    "linear_logprob",
    "linear_logprob_stats",
    "preference_loss",
    "rdpo_loss",
    "shift_labels",
    "stack_cells",
]
