"""How many rows got how far, and why not further."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Mapping
from typing import Any


def funnel(
    outcomes: Iterable[Mapping[str, Any]],
    *,
    rejected: Mapping[str, int],
    annotated: int,
    excluded: Mapping[str, int],
) -> dict[str, Any]:
    """Counts for ``funnel.json``.

    Args:
        outcomes: One a row, see :class:`~realign.build.induction.Outcome`; read once.
        rejected: Rows of the source that were bad, by code; not among ``outcomes``.
        annotated: Rows whose answer was asked for.
        excluded: Neighbours that were no candidates, by reason.
    """
    rows = 0
    masked_by: Counter[str] = Counter()
    ranks: Counter[int] = Counter()
    dropped: Counter[str] = Counter()
    refused: Counter[str] = Counter()
    for outcome in outcomes:
        rows += 1
        masked_by[outcome["masked_by"]] += bool(outcome["masked"])
        if outcome["reason"]:
            dropped[outcome["reason"]] += 1
        else:
            ranks[outcome["rank"]] += 1
        refused.update(attempt["reason"] for attempt in outcome["refused"])
    return {
        "rows": rows,
        "rejected": _most_first(Counter(rejected)),
        "annotated": annotated,
        "masked_by": _most_first(masked_by),
        "excluded_neighbours": dict(excluded),
        "accepted": ranks.total(),
        "accepted_by_rank": {str(rank): count for rank, count in sorted(ranks.items())},
        "dropped": _most_first(dropped),
        "refused_candidates": _most_first(refused),
    }


def _most_first(counts: Counter[str]) -> dict[str, int]:
    """What was counted at all, the most frequent first."""
    return {
        reason: count
        for reason, count in sorted(counts.items(), key=lambda item: (-item[1], item[0]))
        if count
    }
