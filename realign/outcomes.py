"""What `realign build` tried: its shard files read back, a line at a time, for looking at them."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from realign.errors import RefusedError


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
    """Row id to the distinct reasons for which candidates were refused before one was accepted."""
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
