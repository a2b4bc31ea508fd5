"""Readers of the shard files of `realign build`: every attempt, and counts of rows by outcome."""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from realign.errors import RefusedError
from realign.runtime.strict_json import read_json

Counts = Mapping[str, Any]
# what the folders of earlier builds lack
LATER: Counts = {
    "rejected": {},
    "unsampled": 0,
    "annotated": 0,
    "excluded_neighbours": {},
    "decisions": {"dropped": 0},
}


def read_outcomes(folder: Path) -> Iterator[dict[str, Any]]:
    """Yield every line of ``<folder>/shards/*.jsonl`` in order; none where there are no shards.

    Raises:
        RefusedError: A line is not an outcome; the message names it.
    """
    for path in sorted((folder / "shards").glob("*.jsonl")):
        with path.open("rb") as file:
            for number, raw in enumerate(file, start=1):
                yield _outcome(raw, f"{path}, line {number}")


def tried_before(folder: Path) -> dict[str, tuple[str, ...]]:
    """Map the id of each accepted row to the distinct reasons that refused earlier candidates."""
    known: dict[tuple[str, ...], tuple[str, ...]] = {}  # a few kinds, however many rows
    found = {}
    for outcome in read_outcomes(folder):
        if not outcome["reason"]:
            reasons = tuple(dict.fromkeys(attempt["reason"] for attempt in outcome["refused"]))
            found[str(outcome["id"])] = known.setdefault(reasons, reasons)
    return found


def _outcome(raw: bytes, where: str) -> dict[str, Any]:
    try:
        value = json.loads(raw)
    except ValueError:
        value = None
    if not (
        isinstance(value, dict)
        and all(isinstance(value.get(name), str) for name in ("id", "reason", "masked"))
        and isinstance(value.get("refused"), list)
        and all(
            isinstance(attempt, dict) and isinstance(attempt.get("reason"), str)
            for attempt in value["refused"]
        )
    ):
        raise RefusedError(
            f"{where} must be an outcome of `realign build`, got {raw[:60]!r}. Build into a new "
            "folder."
        )
    return value


@dataclass(frozen=True)
class Line:
    """One count and its share of the table's total."""

    label: str
    count: int
    whole: int
    kind: str = ""  # how the bar is coloured: accepted, dropped

    @property
    def percent(self) -> float:
        """Format a share of the total as a percentage."""
        return 100 * self.count / max(self.whole, 1)


def read_funnel(folder: Path) -> Counts | None:
    """Return the counts that the build wrote, or None if there are none."""
    path = folder / "funnel.json"
    return {**LATER, **read_json(path)} if path.is_file() else None


def taken_rows(counts: Counts) -> int:
    """Return how many rows of the source the build took: bad ones, and those of the sample."""
    number: int = counts["rows"] + sum(counts["rejected"].values())
    return number


def row_lines(counts: Counts) -> list[Line]:
    """Count source rows: bad by code, masked by method, accepted, dropped by reason and by hand."""
    bad, rows = counts["rejected"], taken_rows(counts)
    lines = [Line("in the source", rows, rows)]
    if unsampled := counts["unsampled"]:
        whole = rows + unsampled
        lines = [
            Line("in the source", whole, whole),
            Line("not in the sample", unsampled, whole),
            # the shares below are of these
            Line("in the sample, or bad" if bad else "in the sample", rows, rows),
        ]
    lines += [Line(f"bad: {code}", count, rows, "dropped") for code, count in _by_count(bad)]
    if counts["annotated"]:
        lines.append(Line("answered by the annotator", counts["annotated"], rows))
    lines += [Line(f"masked by {who}", n, rows) for who, n in counts["masked_by"].items()]
    lines.append(Line("accepted", counts["accepted"], rows, "accepted"))
    lines += [
        Line(f"dropped: {reason}", count, rows, "dropped")
        for reason, count in _by_count(counts["dropped"])
    ]
    if dropped := counts["decisions"]["dropped"]:
        lines.append(Line("accepted, then dropped by hand", dropped, rows, "dropped"))
    return lines


def candidate_lines(counts: Counts) -> list[Line]:
    """Count the retrieved images that were tried: accepted, or refused by reason."""
    refused = counts["refused_candidates"]
    tried = counts["accepted"] + sum(refused.values())
    lines = [
        Line("tried", tried, tried),
        Line("accepted", counts["accepted"], tried, "accepted"),
    ]
    lines += [Line(f"refused: {name}", n, tried, "dropped") for name, n in _by_count(refused)]
    return lines + [
        Line(f"not tried: {name.replace('_', ' ')}", count, tried)
        for name, count in _by_count(counts["excluded_neighbours"])
    ]


def _by_count(counts: Mapping[str, int]) -> Iterator[tuple[str, int]]:
    yield from sorted(counts.items(), key=lambda item: (-item[1], item[0]))
