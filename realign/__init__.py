"""Re-Align for vision-language models: dual-preference data, rDPO training, measurement.

Public names are loaded when first used, so that ``import realign`` is fast and needs no network.
"""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from realign.collate import PreferenceCollator
    from realign.dataset import read_records
    from realign.errors import RefusedError
    from realign.parquet import write_parquet
    from realign.records import Record
    from realign.trainer import RDPOConfig, RDPOTrainer

__version__ = "0.1.0"

_HOMES = {
    "PreferenceCollator": "realign.collate",
    "RDPOConfig": "realign.trainer",
    "RDPOTrainer": "realign.trainer",
    "Record": "realign.records",
    "RefusedError": "realign.errors",
    "read_records": "realign.dataset",
    "write_parquet": "realign.parquet",
}
__all__ = [
    "PreferenceCollator",
    "RDPOConfig",
    "RDPOTrainer",
    "Record",
    "RefusedError",
    "read_records",
    "write_parquet",
]


def __getattr__(name: str) -> Any:
    if name not in _HOMES:
        raise AttributeError(f"module 'realign' has no attribute {name!r}")
    return getattr(import_module(_HOMES[name]), name)
