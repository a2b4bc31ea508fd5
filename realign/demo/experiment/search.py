"""Tuning: which setting is tried next, and which one is the best of those that were tried."""

from __future__ import annotations

from collections.abc import Mapping
from typing import NamedTuple

from realign.demo.experiment.protocol import Grid

# Factors from a value of an axis to the ones beyond it.
RATE_FACTOR, BETA_FACTOR, ROWS_FACTOR, FEWER_ROWS = 2.0, 3.0, 2, 3


Values = tuple[float, ...]


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


def next_trials(grid: Grid, known: Mapping[Setting, float], max_extensions: int) -> list[Trial]:
    """Return the runs that a search asks for next; none where it is over.

    First the learning rates at the first beta, then the other betas at the best rate, then values
    beyond the grid while the best one is the last of its axis.

    Args:
        grid: Where the search begins.
        known: Settings to their score; more is better.
        max_extensions: Values beyond the grid of each axis.
    """
    tried = {(setting.learning_rate, setting.beta) for setting in known}
    first = grid.betas[0]
    if rates := [rate for rate in grid.learning_rates if (rate, first) not in tried]:
        return [Trial(rate, first, grid.rows) for rate in rates]
    rate = best_setting(
        {setting: score for setting, score in known.items() if setting.beta == first}
    ).learning_rate
    if betas := [beta for beta in grid.betas if (rate, beta) not in tried]:
        return [Trial(rate, beta, grid.rows) for beta in betas]
    best = best_setting(known)
    trials = []
    for axis, (declared, values) in _axes(grid, known).items():
        beyond = _beyond(axis, best, declared, values)
        if beyond is None or len(values - {*declared}) >= max_extensions:
            continue
        trials.append(
            Trial(
                beyond if axis == "learning_rate" else best.learning_rate,
                beyond if axis == "beta" else best.beta,
                (int(beyond),) if axis == "rows" else grid.rows,
            )
        )
    return trials


def best_setting(known: Mapping[Setting, float]) -> Setting:
    """Return the setting with the highest score; of equals the one with the fewest rows, then the
    lowest rate.
    """
    return min(
        known,
        key=lambda setting: (-known[setting], setting.rows, setting.learning_rate, setting.beta),
    )


def edges(grid: Grid, known: Mapping[Setting, float]) -> list[str]:
    """Return the axes on which the best setting is the last value that was tried."""
    best = best_setting(known)
    return [
        axis
        for axis, (declared, values) in _axes(grid, known).items()
        if _beyond(axis, best, declared, values) is not None
    ]


def _axes(grid: Grid, known: Mapping[Setting, float]) -> dict[str, tuple[Values, set[float]]]:
    """Return, by axis, the values that were declared and those that were tried."""
    return {
        "learning_rate": (grid.learning_rates, {setting.learning_rate for setting in known}),
        "beta": (grid.betas, {setting.beta for setting in known}),
        "rows": (grid.rows, {setting.rows for setting in known}),
    }


def _beyond(axis: str, best: Setting, declared: Values, values: set[float]) -> float | None:
    """Return the value beyond the best one; None where the best is not the last of the axis."""
    value = getattr(best, axis)
    if len(declared) == 1 or min(values) < value < max(values):
        return None
    is_last = value == max(values)
    if axis == "rows":
        return value * ROWS_FACTOR if is_last else value // FEWER_ROWS or None
    factor = RATE_FACTOR if axis == "learning_rate" else BETA_FACTOR
    return value * factor if is_last else value / factor
