"""The objectives that a run can name: tables of realign_kernels."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable

from realign_kernels import Objective


def _sft(beta: float) -> Objective:
    """Likelihood of the chosen answers alone; the text term, weight 0, is there for its metrics."""
    (text,) = Objective.dpo(beta).terms
    return Objective((dataclasses.replace(text, weight=0.0),), nll_weight=1.0)


# name -> objective of (beta, image_beta, image_weight)
OBJECTIVES: dict[str, Callable[[float, float, float], Objective]] = {
    "rdpo": Objective.rdpo,
    "dpo": lambda beta, image_beta, image_weight: Objective.dpo(beta),
    "mdpo": Objective.mdpo,
    "symmetric": Objective.symmetric,
    "sft": lambda beta, image_beta, image_weight: _sft(beta),
}


def make_objective(
    name: str, *, beta: float, image_beta: float | None, image_weight: float, nll_weight: float
) -> Objective:
    """Return the objective of a name, with ``nll_weight`` added to it.

    Raises:
        ValueError: The name is unknown.
    """
    if name not in OBJECTIVES:
        raise ValueError(f"objective must be one of {sorted(OBJECTIVES)}, got {name!r}.")
    objective = OBJECTIVES[name](beta, beta if image_beta is None else image_beta, image_weight)
    return dataclasses.replace(objective, nll_weight=nll_weight or objective.nll_weight)
