"""The tables of README, docs/experiment.md and docs/results/tuning.md, from
``results/experiment/results.json``.

This module only formats.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from benchmarks.result_files import load
from realign.demo.experiment.tables import (
    claims_table,
    paper_table,
    short_table,
    tuning_table,
    views_table,
)

# The function that writes each block, by the block's mark.
TABLES: Mapping[str, Callable[[Mapping[str, Any]], str]] = {
    "experiment summary": short_table,
    "experiment claims": claims_table,
    "experiment conditions": views_table,
    "experiment beside the paper": paper_table,
    "experiment tuning": tuning_table,
}


def experiment_block(mark: str, results: Path) -> str:
    """Return everything between the marks of one of ``TABLES``."""
    return TABLES[mark](load(results / "experiment" / "results.json"))
