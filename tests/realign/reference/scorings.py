"""Scorings of a model in float32, and their identities."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch

from realign.modeling.acceleration import Numerics
from realign.reference import Scoring


def scoring(folder: Path, **options: Any) -> Scoring:
    """Return a scoring of three cells by labels, in batches of four, where no option differs."""
    scored = {"cells": 3, "rejected_scoring": "label", "batch_size": 4}
    scored = {name: options.pop(name, default) for name, default in scored.items()}
    return Scoring(folder, numerics=Numerics(**{"dtype": torch.float32, **options}), **scored)


def identity(folder: Path, **options: Any) -> dict[str, Any]:
    """Return the identity of such a scoring."""
    return scoring(folder, **options).identity()
