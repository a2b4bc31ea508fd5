"""Tuning: choose the next settings to try, and the best setting so far."""

from __future__ import annotations

from collections.abc import Mapping
from typing import NamedTuple

from realign.demo.experiment.protocol import Grid

# Factors between neighbouring values of each axis beyond the grid.
RATE_FACTOR, BETA_FACTOR, ROWS_FACTOR, FEWER_ROWS = 2.0, 3.0, 2, 3


class Trial(NamedTuple):
    """A training run of a search: learning rate, beta, and the rows after which it is scored."""

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
    """Return the next runs of a search; none if the search is over.

    The search tries the learning rates with the first beta, and then the other betas with the best
    learning rate. After that it tries the untried neighbours of the best setting on every axis,
    also beyond the grid, until the best setting is better than all its neighbours.

    Args:
        grid: Grid with which the search begins.
        known: Setting to its score; a higher one is better.
        num_done: Number of runs done so far.
        max_extensions: Largest number of runs after those of the grid.
    """
    if not num_done:
        return [Trial(rate, grid.betas[0], grid.rows) for rate in grid.learning_rates]
    best = best_setting(known)
    if num_done == len(grid.learning_rates) and len(grid.betas) > 1:
        return [Trial(best.learning_rate, beta, grid.rows) for beta in grid.betas[1:]]
    num_of_grid = len(grid.learning_rates) + len(grid.betas) - 1
    return [trial for _, trial in _untried(grid, known)][: num_of_grid + max_extensions - num_done]


def best_setting(known: Mapping[Setting, float]) -> Setting:
    """Return the setting with the highest score; among equal scores, the one with the fewest rows,
    then the lowest learning rate.
    """
    return min(
        known,
        key=lambda setting: (-known[setting], setting.rows, setting.learning_rate, setting.beta),
    )


def edges(grid: Grid, known: Mapping[Setting, float]) -> list[str]:
    """Return the axes on which the best setting has an untried neighbour."""
    return sorted({axis for axis, _ in _untried(grid, known)})


def _untried(grid: Grid, known: Mapping[Setting, float]) -> list[tuple[str, Trial]]:
    """Return axis and run of every untried neighbour of the best setting."""
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
