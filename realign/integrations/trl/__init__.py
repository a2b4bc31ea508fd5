"""TRL: exact log-probabilities in its trainers, and rDPO as one of them.

Public names are loaded when first used, so that each imports only the parts of TRL that it uses.
"""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING, Any

from realign.errors import RefusedError

if TYPE_CHECKING:
    from realign.integrations.trl.patch import patch_trl as patch_trl
    from realign.integrations.trl.trainer import RdpoTrainer as RdpoTrainer

_HOMES = {
    "RdpoTrainer": "realign.integrations.trl.trainer",
    "patch_trl": "realign.integrations.trl.patch",
}
__all__ = [*_HOMES]


def __getattr__(name: str) -> Any:
    if name not in _HOMES:
        raise AttributeError(f"module 'realign.integrations.trl' has no attribute {name!r}")
    try:
        home = import_module(_HOMES[name])
    except ImportError as error:
        if (error.name or "").partition(".")[0] != "trl":
            raise
        raise RefusedError(
            f"{name} requires trl, got none that it can use: {error}. Install trl 1.16, with which "
            "this was tested: pip install 'trl>=1.16'."
        ) from error
    return getattr(home, name)
