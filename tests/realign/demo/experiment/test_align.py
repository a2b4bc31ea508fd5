"""Refusals of a run, and the options that it gives to the trainer."""

from __future__ import annotations

from pathlib import Path

import pytest

from realign.demo.experiment.align import align, objective_options
from realign.demo.experiment.protocol import Condition
from realign.errors import RefusedError
from realign.training.objectives import ObjectiveOptions, make_objective
from realign_kernels import Objective


def test_too_few_pairs_are_refused(model_dir: Path) -> None:
    with pytest.raises(RefusedError, match=r"at least 16 pairs, got 0\. Draw more scenes"):
        align(Condition("DPO", "dpo"), 1e-4, 0.1, 0, [], model_dir, None, [1], lambda *_: None)


@pytest.mark.parametrize(
    ("condition", "expected"),
    [
        (Condition("DPO", "dpo"), Objective.dpo(0.3)),
        (Condition("rDPO", "rdpo"), Objective.rdpo(0.3)),
        (Condition("weight", "rdpo", image_weight=0.25), Objective.rdpo(0.3, image_weight=0.25)),
        (Condition("vDPO", "vdpo"), Objective(Objective.rdpo(0.3).terms[1:])),
        (Condition("four", "symmetric"), Objective.symmetric(0.3)),
    ],
    ids=lambda value: value.name if isinstance(value, Condition) else "",
)
def test_a_condition_trains_with_its_objective(condition: Condition, expected: Objective) -> None:
    assert make_objective(ObjectiveOptions(**objective_options(condition, 0.3))) == expected
