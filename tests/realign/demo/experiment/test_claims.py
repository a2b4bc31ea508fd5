"""Verdicts follow from intervals, and the protocol names what exists."""

from __future__ import annotations

import math
from dataclasses import replace

import pytest

from realign.demo.experiment.claims import FAILS, HOLDS, OPEN, SMALL, verdict
from realign.demo.experiment.intervals import Interval
from realign.demo.experiment.pairs import KINDS
from realign.demo.experiment.protocol import BASE, FULL, SMOKE, Claim, Protocol, View
from realign.demo.experiment.records import REJECTED_IMAGES
from realign.demo.experiment.stages import steps_for
from realign.training.objectives import OBJECTIVES

MORE = Claim(View("a"), View("b"), "free.recall")
LESS = replace(MORE, sign=-1)
KEEPS = replace(MORE, keeps_up=True)


@pytest.mark.parametrize(
    ("claim", "low", "high", "expected"),
    [
        (MORE, 0.001, 0.05, HOLDS),
        (MORE, 0.001, 0.009, SMALL),
        (MORE, -0.001, 0.05, OPEN),
        (MORE, -0.03, 0.009, FAILS),
        (MORE, -0.05, -0.01, FAILS),
        (LESS, -0.05, -0.001, HOLDS),
        (LESS, -0.05, 0.001, OPEN),
        (LESS, 0.001, 0.05, FAILS),
        (LESS, -0.009, 0.02, FAILS),
        (KEEPS, -0.009, 0.05, HOLDS),
        (KEEPS, -0.02, 0.05, OPEN),
        (KEEPS, -0.05, -0.011, FAILS),
        (MORE, -math.inf, math.inf, OPEN),
        (MORE, math.nan, math.nan, OPEN),
    ],
)
def test_the_verdict_follows_from_the_interval(
    claim: Claim, low: float, high: float, expected: str
) -> None:
    assert verdict(claim, Interval((low + high) / 2, low, high)) == expected


@pytest.mark.parametrize("protocol", [FULL, SMOKE], ids=["full", "smoke"])
def test_the_protocol_names_existing_objectives_and_settings(protocol: Protocol) -> None:
    names = [condition.name for condition in protocol.conditions]
    assert len(names) == len({*names, BASE}) - 1
    for condition in protocol.conditions:
        assert condition.objective in OBJECTIVES
        assert condition.pairs in KINDS
        assert condition.rejected_image in REJECTED_IMAGES
        tuned = protocol.condition(condition.settings_of or condition.name)
        assert tuned.is_tuned
        assert tuned.objective == condition.objective or condition.settings_of == "rDPO"
    for claim in protocol.claims:
        assert {claim.better.condition, claim.than.condition} <= {*names, BASE}
    assert len({*protocol.claims}) == len(protocol.claims)
    assert not {*protocol.tuning_seeds} & {*protocol.reporting_seeds}
    assert protocol.tuning_draw not in protocol.reporting_draws


def test_all_objectives_are_tuned_with_equally_many_runs_over_equal_rows() -> None:
    tuned = [condition for condition in FULL.conditions if condition.is_tuned]
    grids = [FULL.grid_of(condition) for condition in tuned]
    runs = {len(grid.learning_rates) + len(grid.betas) - 1 for grid in grids}
    assert runs == {5}
    assert len({grid.rows for grid in grids}) == 1
    for condition, grid in zip(tuned, grids, strict=True):
        for rows in grid.rows:
            assert steps_for(rows, condition) * condition.rows_per_pair == rows


def test_six_claims_are_primary() -> None:
    assert sum(claim.is_primary for claim in FULL.claims) == 6
