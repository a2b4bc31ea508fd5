"""Readers of the files of `realign build`: the outcome of every row, and counts of rows."""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from realign.errors import RefusedError
from realign.runtime.strict_json import read_json

Counts = Mapping[str, Any]
# counts that folders of earlier builds lack
DEFAULTS: Counts = {
    "rejected": {},
    "unsampled": 0,
    "annotated": 0,
    "excluded_neighbours": {},
    "decisions": {"dropped": 0},
}


def read_outcomes(folder: Path) -> Iterator[dict[str, Any]]:
    """Yield every line of ``<folder>/shards/*.jsonl``, in order; none if there are no shards.

    Raises:
        RefusedError: A line is not an outcome; the message names it.
    """
    for path in sorted((folder / "shards").glob("*.jsonl")):
        with path.open("rb") as file:
            for number, raw in enumerate(file, start=1):
                yield _outcome(raw, f"{path}, line {number}")


def tried_before(folder: Path) -> dict[str, tuple[str, ...]]:
    """Return, by the id of each accepted row, the distinct reasons why earlier candidates were
    refused.
    """
    known: dict[tuple[str, ...], tuple[str, ...]] = {}  # rows with equal reasons share one tuple
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
    """A line of a table of counts.

    Attributes:
        label: The label.
        count: The count.
        whole: The total that the count is a share of.
        kind: Class of the bar's colour: ``accepted``, ``dropped``, or empty.
    """

    label: str
    count: int
    whole: int
    kind: str = ""

    @property
    def percent(self) -> float:
        """Share of the total, in percent."""
        return 100 * self.count / max(self.whole, 1)


def read_funnel(folder: Path) -> Counts | None:
    """Return the counts that a build wrote, or None if it has not written them."""
    path = folder / "funnel.json"
    return {**DEFAULTS, **read_json(path)} if path.is_file() else None


def taken_rows(counts: Counts) -> int:
    """Return the number of source rows that a build used: those of the sample, and bad ones."""
    num_rows: int = counts["rows"] + sum(counts["rejected"].values())
    return num_rows


def row_lines(counts: Counts) -> list[Line]:
    """Return the counts of source rows: bad ones by code, masked ones by method, accepted ones, and
    dropped ones by reason.
    """
    bad, rows = counts["rejected"], taken_rows(counts)
    lines = [Line("in the source", rows, rows)]
    if unsampled := counts["unsampled"]:
        whole = rows + unsampled
        lines = [
            Line("in the source", whole, whole),
            Line("not in the sample", unsampled, whole),
            # the shares of all lines below refer to this one
            Line("in the sample, or bad" if bad else "in the sample", rows, rows),
        ]
    lines += [Line(f"bad: {code}", count, rows, "dropped") for code, count in _by_count(bad)]
    if counts["annotated"]:
        lines.append(Line("answered by the annotator", counts["annotated"], rows))
    lines += [Line(f"masked by {masker}", n, rows) for masker, n in counts["masked_by"].items()]
    lines.append(Line("accepted", counts["accepted"], rows, "accepted"))
    lines += [
        Line(f"dropped: {reason}", count, rows, "dropped")
        for reason, count in _by_count(counts["dropped"])
    ]
    if dropped := counts["decisions"]["dropped"]:
        lines.append(Line("accepted, then dropped by hand", dropped, rows, "dropped"))
    return lines


def candidate_lines(counts: Counts) -> list[Line]:
    """Return the counts of retrieved images: accepted ones, and refused ones by reason."""
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
