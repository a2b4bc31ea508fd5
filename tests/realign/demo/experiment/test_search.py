"""The search asks for the same runs whatever is searched, and goes on where the best is on an
edge.
"""

from __future__ import annotations

import math
from collections.abc import Callable

import pytest

from realign.demo.experiment.protocol import Grid
from realign.demo.experiment.search import Setting, Trial, best_setting, edges, next_trials

GRID = Grid((1e-4, 2e-4, 4e-4), (0.1, 0.03, 0.3), (36, 72, 144))


def search(
    score: Callable[[Setting], float], grid: Grid = GRID, most: int = 2
) -> tuple[dict[Setting, float], list[list[Trial]]]:
    known: dict[Setting, float] = {}
    rounds = []
    while trials := next_trials(grid, known, sum(map(len, rounds)), most):
        rounds.append(trials)
        assert len(rounds) < 20
        for rate, beta, rows in trials:
            settings = [Setting(rate, beta, some) for some in rows]
            known |= {setting: score(setting) for setting in settings}
    return known, rounds


def hill(rate: float, beta: float, rows: float) -> Callable[[Setting], float]:
    """A score with one summit."""

    def score(setting: Setting) -> float:
        return -sum(
            math.log(value / top) ** 2
            for value, top in zip(setting, (rate, beta, rows), strict=True)
        )

    return score


def test_an_optimum_inside_the_grid_is_found_in_five_runs() -> None:
    known, rounds = search(hill(2e-4, 0.1, 72))
    assert [len(trials) for trials in rounds] == [3, 2]
    assert rounds[1] == [Trial(2e-4, beta, GRID.rows) for beta in (0.03, 0.3)]
    assert best_setting(known) == Setting(2e-4, 0.1, 72)
    assert edges(GRID, known) == []


def test_values_beyond_the_grid_are_tried_until_none_is_better() -> None:
    known, rounds = search(hill(8e-4, 0.1, 288), most=10)
    assert rounds[2] == [Trial(8e-4, 0.1, GRID.rows), Trial(4e-4, 0.1, (288,))]
    best = best_setting(known)
    assert best == Setting(8e-4, 0.1, 288)
    assert edges(GRID, known) == []
    assert {Setting(1.6e-3, 0.1, 288), Setting(8e-4, 0.1, 576)} <= {*known}


def test_fewer_rows_and_lower_rates_are_tried_too() -> None:
    known, rounds = search(hill(5e-5, 0.1, 12), most=9)
    assert rounds[2] == [Trial(5e-5, 0.1, GRID.rows), Trial(1e-4, 0.1, (12,))]
    assert best_setting(known) == Setting(5e-5, 0.1, 12)


def test_an_unsearched_neighbour_is_reported() -> None:
    known, rounds = search(hill(1.0, 0.1, 72), most=2)  # no rate is high enough
    assert sum(map(len, rounds)) == 5 + 2
    assert max(setting.learning_rate for setting in known) == pytest.approx(4e-4 * 2 * 2)
    assert edges(GRID, known) == ["beta", "learning_rate"]


def test_an_axis_of_one_value_is_not_searched() -> None:
    grid = Grid((1e-4, 2e-4, 4e-4), (0.1,), (36,))
    known, rounds = search(hill(2e-4, 5.0, 1000), grid)
    assert [len(trials) for trials in rounds] == [3]
    assert edges(grid, known) == []


def test_the_cheapest_of_equal_settings_is_best() -> None:
    known, _ = search(lambda setting: 1.0, most=0)
    assert len(known) == 5 * 3
    assert best_setting(known) == Setting(1e-4, 0.03, 36)
