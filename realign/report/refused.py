"""The candidates that `realign build` refused: their distances, and examples of every reason."""

from __future__ import annotations

from array import array
from collections import defaultdict
from dataclasses import dataclass, field
from math import isfinite
from pathlib import Path
from typing import Any

from realign.outcomes import read_outcomes

EXAMPLES = 4  # a reason


@dataclass(frozen=True)
class Example:
    """One refused completion."""

    row: str
    masked: str
    completion: str


@dataclass
class Refused:
    """All refused candidates of a build folder.

    Attributes:
        similarities: Of the completions to the given answers, where the shards hold them.
        cosines: Of the images, where the shards hold them.
        examples: By reason, the first ones of different rows.
    """

    similarities: array[float] = field(default_factory=lambda: array("d"))
    cosines: array[float] = field(default_factory=lambda: array("d"))
    examples: dict[str, list[Example]] = field(default_factory=lambda: defaultdict(list))

    @classmethod
    def read(cls, folder: Path) -> Refused:
        """Read the shards of a build folder, a line at a time."""
        refused = cls()
        for outcome in read_outcomes(folder):
            for attempt in outcome["refused"]:
                refused._add(outcome, attempt)
        return refused

    def _add(self, outcome: dict[str, Any], attempt: dict[str, Any]) -> None:
        for name, values in (("similarity", self.similarities), ("cosine", self.cosines)):
            value = attempt.get(name)
            # without a completion there was nothing to compare
            if isinstance(value, int | float) and isfinite(value) and attempt.get("completion"):
                values.append(value)
        examples = self.examples[attempt["reason"]]
        is_new = not examples or examples[-1].row != outcome["id"]
        if len(examples) < EXAMPLES and is_new and attempt.get("completion"):
            examples.append(Example(outcome["id"], outcome["masked"], attempt["completion"]))
