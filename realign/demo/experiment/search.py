"""Tuning: which setting is tried next, and which one is the best of those that were tried."""

from __future__ import annotations

from collections.abc import Mapping
from typing import NamedTuple

from realign.demo.experiment.protocol import Grid

# Factors from a value of an axis to the ones beyond it.
RATE_FACTOR, BETA_FACTOR, ROWS_FACTOR, FEWER_ROWS = 2.0, 3.0, 2, 3


class Trial(NamedTuple):
    """A training run of a search: its rate and beta, and the rows after which it is scored."""

    learning_rate: float
    beta: float
    rows: tuple[int, ...]


class Setting(NamedTuple):
    """One point of a search."""

    learning_rate: float
    beta: float
    rows: int


def next_trials(
    grid: Grid, known: Mapping[Setting, float], num_done: int, max_extensions: int
) -> list[Trial]:
    """Return the runs that a search asks for next; none where it is over.

    First the learning rates at the first beta, then the other betas at the best rate. Then the
    neighbours of the best setting on every axis that were not tried, also those beyond the grid,
    until the best one is better than all of its neighbours.

    Args:
        grid: Where the search begins.
        known: Settings to their score; more is better.
        num_done: Runs that gave them.
        max_extensions: Runs after those of the grid.
    """
    if not num_done:
        return [Trial(rate, grid.betas[0], grid.rows) for rate in grid.learning_rates]
    best = best_setting(known)
    if num_done == len(grid.learning_rates) and len(grid.betas) > 1:
        return [Trial(best.learning_rate, beta, grid.rows) for beta in grid.betas[1:]]
    num_of_grid = len(grid.learning_rates) + len(grid.betas) - 1
    return [trial for _, trial in _untried(grid, known)][: num_of_grid + max_extensions - num_done]


def best_setting(known: Mapping[Setting, float]) -> Setting:
    """Return the setting with the highest score; of equals the one with the fewest rows, then the
    lowest rate.
    """
    return min(
        known,
        key=lambda setting: (-known[setting], setting.rows, setting.learning_rate, setting.beta),
    )


def edges(grid: Grid, known: Mapping[Setting, float]) -> list[str]:
    """Return the axes on which a neighbour of the best setting was not tried."""
    return sorted({axis for axis, _ in _untried(grid, known)})


def _untried(grid: Grid, known: Mapping[Setting, float]) -> list[tuple[str, Trial]]:
    """Return the axes and runs of the best setting's neighbours that were not tried."""
    best = best_setting(known)
    in_full = {(one.learning_rate, one.beta) for one in known if one.rows in grid.rows}
    found = []
    for axis, declared, factor in (
        ("learning_rate", grid.learning_rates, RATE_FACTOR),
        ("beta", grid.betas, BETA_FACTOR),
        ("rows", grid.rows, ROWS_FACTOR),
    ):
        if len(declared) == 1:
            continue
        value = getattr(best, axis)
        values = {getattr(setting, axis) for setting in known}
        fewer = value // FEWER_ROWS if axis == "rows" else value / factor
        below = max((other for other in values if other < value), default=fewer)
        above = min((other for other in values if other > value), default=value * factor)
        for other in (below, above):
            neighbour = best._replace(**{axis: other})
            if other and neighbour not in known:
                place = (neighbour.learning_rate, neighbour.beta)
                rows = {neighbour.rows} if place in in_full else {neighbour.rows, *grid.rows}
                found.append((axis, Trial(*place, tuple(sorted(rows)))))
    return found
