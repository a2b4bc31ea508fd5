"""Re-Align for vision-language models: dual-preference data, rDPO training, measurement.

Public names are loaded when first used, so that ``import realign`` is fast and needs no network.
"""

from __future__ import annotations

from importlib import import_module, util
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from realign.config import TrainConfig as TrainConfig
    from realign.data.dataset import read_records as read_records
    from realign.data.formats.parquet import write_parquet as write_parquet
    from realign.data.records import Record as Record
    from realign.errors import RefusedError as RefusedError
    from realign.modeling.acceleration import Numerics as Numerics
    from realign.modeling.adapters import add_adapter as add_adapter
    from realign.modeling.collate import PreferenceCollator as PreferenceCollator
    from realign.modeling.folder import resolve_model as resolve_model
    from realign.modeling.loading import load_model as load_model
    from realign.modeling.processors import load_processor as load_processor
    from realign.modeling.row_checks import check_rows as check_rows
    from realign.reference.build import build_cache as build_cache
    from realign.reference.read import read_cache as read_cache
    from realign.reference.scoring import Scoring as Scoring
    from realign.training.run import train as train
    from realign.training.trainer import RDPOConfig as RDPOConfig
    from realign.training.trainer import RDPOTrainer as RDPOTrainer

__version__ = "0.2.0"

if getattr(util.find_spec("realign_kernels"), "origin", None) is None:
    raise ImportError(
        "realign requires realign_kernels, which is missing. Run pip install --force-reinstall "
        "--no-deps realign-kernels, or `.` in a clone of realign."
    )

_HOMES = {
    "Numerics": "realign.modeling.acceleration",
    "PreferenceCollator": "realign.modeling.collate",
    "RDPOConfig": "realign.training.trainer",
    "RDPOTrainer": "realign.training.trainer",
    "Record": "realign.data.records",
    "RefusedError": "realign.errors",
    "Scoring": "realign.reference.scoring",
    "TrainConfig": "realign.config",
    "add_adapter": "realign.modeling.adapters",
    "build_cache": "realign.reference.build",
    "check_rows": "realign.modeling.row_checks",
    "load_model": "realign.modeling.loading",
    "load_processor": "realign.modeling.processors",
    "read_cache": "realign.reference.read",
    "read_records": "realign.data.dataset",
    "resolve_model": "realign.modeling.folder",
    "train": "realign.training.run",
    "write_parquet": "realign.data.formats.parquet",
}
__all__ = [*_HOMES]


def __getattr__(name: str) -> Any:
    if name not in _HOMES:
        raise AttributeError(f"module 'realign' has no attribute {name!r}")
    return getattr(import_module(_HOMES[name]), name)
