"""The named objectives of runs, as tables of realign_kernels, and their options."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

from realign.errors import RefusedError
from realign_kernels import Objective


def _sft(beta: float) -> Objective:
    """Return the likelihood of the chosen answers; a text term of weight 0 is there for metrics."""
    (text,) = Objective.dpo(beta).terms
    return Objective((dataclasses.replace(text, weight=0.0),), nll_weight=1.0)


# name -> objective of (beta, image_beta, image_weight)
OBJECTIVES: dict[str, Callable[[float, float, float], Objective]] = {
    "rdpo": Objective.rdpo,
    "dpo": lambda beta, image_beta, image_weight: Objective.dpo(beta),
    "vdpo": lambda *options: Objective(Objective.rdpo(*options).terms[1:]),  # the image pair
    "mdpo": Objective.mdpo,
    "symmetric": Objective.symmetric,
    "sft": lambda beta, image_beta, image_weight: _sft(beta),
}
WITHOUT_IMAGE_PAIR = ("dpo", "sft")


@dataclass
class ObjectiveOptions:
    """Options of the objective; the defaults are the paper's."""

    objective: str = field(default="rdpo", metadata={"help": f"one of {', '.join(OBJECTIVES)}"})
    beta: float = field(default=0.1, metadata={"help": "KL strength of the answer pair"})
    image_beta: float | None = field(
        default=None, metadata={"help": "KL strength of the image pair; beta by default"}
    )
    image_weight: float = field(default=1.0, metadata={"help": "weight of the image pair"})
    nll_weight: float = field(
        default=0.0, metadata={"help": "weight of the chosen answer's mean NLL"}
    )
    rejected_scoring: str = field(
        default="label", metadata={"help": "label, or top_non_label (the authors' code)"}
    )

    @classmethod
    def of(cls, options: Any) -> ObjectiveOptions:
        """Return the options of a configuration that has fields of these names."""
        names = (option.name for option in dataclasses.fields(ObjectiveOptions))
        return ObjectiveOptions(**{name: getattr(options, name) for name in names})


def make_objective(options: ObjectiveOptions) -> Objective:
    """Return the objective of the options, with ``nll_weight`` added to it.

    Raises:
        RefusedError: The name is unknown, or the objective does not read an option that was set.
    """
    name, image_beta = options.objective, options.image_beta
    if name not in OBJECTIVES:
        raise RefusedError(
            f"objective must be one of {sorted(OBJECTIVES)}, got {name!r}. Name one of them."
        )
    for option in ("image_beta", "image_weight") if name in WITHOUT_IMAGE_PAIR else ():
        value = getattr(options, option)
        if value != getattr(ObjectiveOptions, option):
            raise RefusedError(
                f"{option} must not be set with objective {name!r}, which has no image pair, got "
                f"{value}. Drop it."
            )
    image_beta = options.beta if image_beta is None else image_beta
    objective = OBJECTIVES[name](options.beta, image_beta, options.image_weight)
    return dataclasses.replace(objective, nll_weight=options.nll_weight or objective.nll_weight)
