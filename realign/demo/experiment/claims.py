"""Verdicts on claims. The interval over training seeds decides; the interval over images is only
reported with it.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Any

from realign.demo.experiment.intervals import Interval, image_intervals, t_interval
from realign.demo.experiment.protocol import SMALLEST_EFFECT, Claim, View
from realign.demo.experiment.stages import Experiment

HOLDS, SMALL, FAILS, OPEN = "holds", "holds, below 1 point", "does not hold", "cannot be told"


def verdict(claim: Claim, difference: Interval) -> str:
    """Return the verdict on a claim by the interval of its difference (better - than).

    Args:
        claim: Claim to judge.
        difference: Interval of the difference, as a fraction.
    """
    low, high = sorted((claim.sign * difference.low, claim.sign * difference.high))
    if math.isnan(low) or math.isnan(high):
        return OPEN
    if claim.keeps_up:
        return HOLDS if low > -SMALLEST_EFFECT else FAILS if high < -SMALLEST_EFFECT else OPEN
    if low > 0:
        return SMALL if high < SMALLEST_EFFECT else HOLDS
    return FAILS if high < SMALLEST_EFFECT else OPEN


def judge(experiment: Experiment) -> list[dict[str, Any]]:
    """Return every claim with its differences, intervals and verdicts.

    Args:
        experiment: Experiment whose runs are done.
    """
    protocol = experiment.protocol
    num_primary = sum(claim.is_primary for claim in protocol.claims)
    by_pair: dict[tuple[View, View], list[str]] = {}
    for claim in protocol.claims:
        by_pair.setdefault((claim.better, claim.than), []).append(claim.measure)
    over_images = {
        pair: _over_images(experiment, *pair, measures) for pair, measures in by_pair.items()
    }
    rows = []
    for claim in protocol.claims:
        differences = _differences(experiment, claim)
        defined = [value for value in differences.values() if value is not None]
        # if a run stopped, there is no interval: the mean over the others would be too favourable
        interval = t_interval(defined) if len(defined) == len(differences) else None
        row: dict[str, Any] = {
            "better": claim.better._asdict(),
            "than": claim.than._asdict(),
            "measure": claim.measure,
            "keeps_up": claim.keeps_up,
            "is_primary": claim.is_primary,
            "differences": {str(seed): value for seed, value in differences.items()},
            "over_seeds": None if interval is None else interval._asdict(),
            "over_images": over_images[claim.better, claim.than][claim.measure],
            "verdict": OPEN if interval is None else verdict(claim, interval),
        }
        if claim.is_primary and interval is not None:
            strict = t_interval(defined, 1 - 0.05 / num_primary)
            row |= {"strict": strict._asdict(), "strict_verdict": verdict(claim, strict)}
        rows.append(row)
    return rows


def _differences(experiment: Experiment, claim: Claim) -> Mapping[int, float | None]:
    better, than = (experiment.scores_of(view) for view in (claim.better, claim.than))
    found: dict[int, float | None] = {}
    for seed, one in better.items():
        other = than[seed]
        found[seed] = None
        if one is not None and other is not None:
            found[seed] = one[claim.measure] - other[claim.measure]
    return found


def _over_images(
    experiment: Experiment, better: View, than: View, measures: Sequence[str]
) -> dict[str, Any]:
    """Return the intervals over the images of the first reporting seed by measure."""
    seed = experiment.protocol.reporting_seeds[0]
    first, second = (experiment.answers(*experiment.run_of(view, seed)) for view in (better, than))
    if first is None or second is None:
        return dict.fromkeys(measures)
    found = image_intervals(first, second, measures, resamples=experiment.protocol.resamples)
    return {name: None if one is None else one._asdict() for name, one in found.items()}
