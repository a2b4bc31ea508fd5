"""Re-Align for vision-language models: dual-preference data, rDPO training, measurement.

Public names are loaded when first used, so that ``import realign`` is fast and needs no network.
"""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from realign.data.dataset import read_records
    from realign.data.formats.parquet import write_parquet
    from realign.data.records import Record
    from realign.errors import RefusedError
    from realign.modeling.collate import PreferenceCollator
    from realign.training.trainer import RDPOConfig, RDPOTrainer

__version__ = "0.1.0"

_HOMES = {
    "PreferenceCollator": "realign.modeling.collate",
    "RDPOConfig": "realign.training.trainer",
    "RDPOTrainer": "realign.training.trainer",
    "Record": "realign.data.records",
    "RefusedError": "realign.errors",
    "read_records": "realign.data.dataset",
    "write_parquet": "realign.data.formats.parquet",
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
