"""The objectives that a run can name: tables of realign_kernels."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable

from realign.errors import RefusedError
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
WITHOUT_IMAGE_PAIR = ("dpo", "sft")


def make_objective(
    name: str, *, beta: float, image_beta: float | None, image_weight: float, nll_weight: float
) -> Objective:
    """Return the objective of a name, with ``nll_weight`` added to it.

    Raises:
        RefusedError: The name is unknown, or it does not read an option that was set.
    """
    if name not in OBJECTIVES:
        raise RefusedError(
            f"objective must be one of {sorted(OBJECTIVES)}, got {name!r}. Name one of them."
        )
    image_options = (("image_beta", image_beta, None), ("image_weight", image_weight, 1.0))
    for option, value, default in image_options:
        if name in WITHOUT_IMAGE_PAIR and value != default:
            raise RefusedError(
                f"{option} must not be set with objective {name!r}, which has no image pair, got "
                f"{value}. Drop it."
            )
    objective = OBJECTIVES[name](beta, beta if image_beta is None else image_beta, image_weight)
    return dataclasses.replace(objective, nll_weight=nll_weight or objective.nll_weight)
