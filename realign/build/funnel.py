"""How many rows got how far, and why not further."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from typing import Any


def funnel(
    outcomes: Sequence[Mapping[str, Any]],
    *,
    rejected: Mapping[str, int],
    annotated: int,
    excluded: Mapping[str, int],
) -> dict[str, Any]:
    """Counts for ``funnel.json``.

    Args:
        outcomes: One a row, see :class:`~realign.build.induction.Outcome`.
        rejected: Rows of the source that were bad, by code; not among ``outcomes``.
        annotated: Rows whose answer was asked for.
        excluded: Neighbours that were no candidates, by reason.
    """
    accepted = [outcome for outcome in outcomes if not outcome["reason"]]
    return {
        "rows": len(outcomes),
        "rejected": dict(rejected),
        "annotated": annotated,
        "masked_by": _counts(outcome["masked_by"] for outcome in outcomes if outcome["masked"]),
        "excluded_neighbours": dict(excluded),
        "accepted": len(accepted),
        "accepted_by_rank": {
            str(rank): count for rank, count in sorted(Counter(o["rank"] for o in accepted).items())
        },
        "dropped": _counts(outcome["reason"] for outcome in outcomes if outcome["reason"]),
        "refused_candidates": _counts(
            attempt["reason"] for outcome in outcomes for attempt in outcome["refused"]
        ),
    }


def _counts(reasons: Iterable[str]) -> dict[str, int]:
    """Most frequent first."""
    return dict(sorted(Counter(reasons).items(), key=lambda item: (-item[1], item[0])))
