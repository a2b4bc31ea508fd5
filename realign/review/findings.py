"""Findings of a check, as text for people and as files for programs."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from realign.data.problems import by_kind
from realign.data.records import Problem
from realign.runtime.files import write_json, write_jsonl

PROBLEMS = "problems.json"
REJECTED = "rejected.jsonl"


@dataclass
class Findings:
    """Findings of one check.

    Attributes:
        data: Path of the dataset.
        max_reject: Largest share of rejected rows that passes.
        num_rows: How many rows there are.
        rejected: The problems of each rejected row.
        warnings: Problems that are worth a look but do not reject a row.
        notes: Sentences about what was checked and what was not.
        prediction: Lengths and memory predicted for a model; empty without a model.
    """

    data: str
    max_reject: float
    num_rows: int = 0
    rejected: list[list[Problem]] = field(default_factory=list)
    warnings: list[Problem] = field(default_factory=list)
    notes: list[str] = field(default_factory=list)
    prediction: dict[str, Any] = field(default_factory=dict)

    @property
    def problems(self) -> list[Problem]:
        """Return the problems of all rejected rows."""
        return [problem for row in self.rejected for problem in row]

    @property
    def has_passed(self) -> bool:
        """Return whether at most the permitted share of rows was rejected."""
        return len(self.rejected) <= self.max_reject * self.num_rows

    def write(self, folder: Path) -> None:
        """Write ``problems.json`` (all findings) and ``rejected.jsonl`` (one row per line)."""
        write_json(
            folder / PROBLEMS,
            {
                "data": self.data,
                "rows": self.num_rows,
                "rejected_rows": len(self.rejected),
                "max_reject": self.max_reject,
                "has_passed": self.has_passed,
                "counts": dict(Counter(problem.code for problem in self.problems).most_common()),
                "problems": [asdict(problem) for problem in self.problems],
                "warnings": [asdict(problem) for problem in self.warnings],
                "notes": self.notes,
                "prediction": self.prediction,
            },
        )
        write_jsonl(
            folder / REJECTED,
            (
                {
                    "row": row[0].row,
                    "place": row[0].place,
                    "problems": [{"field": p.field, "code": p.code} for p in row],
                }
                for row in self.rejected
            ),
        )

    def lines(self, show: int) -> Iterator[str]:
        """Yield the findings as text, with ``show`` examples of each kind."""
        yield from _grouped(self.problems, show, "")
        yield from _grouped(self.warnings, show, "warning: ")
        yield from self.notes
        yield from _predicted(self.prediction)
        share = len(self.rejected) / max(self.num_rows, 1)
        verdict = "passed" if self.has_passed else "NOT passed"
        yield (
            f"{verdict}: {len(self.rejected)} of {self.num_rows} rows rejected ({share:.2%}; at "
            f"most {self.max_reject:.2%} may be)"
        )


def _grouped(problems: list[Problem], show: int, prefix: str) -> Iterator[str]:
    for group in by_kind(problems):
        code, name = group[0].code, group[0].field
        yield f"{prefix}{code}{f' in {name}' if name else ''}: {len(group)}"
        yield from (f"  {problem.message}" for problem in group[:show])
        if len(group) > show:
            yield f"  ... and {len(group) - show} more"
        yield ""


def _predicted(prediction: dict[str, Any]) -> Iterator[str]:
    if lengths := prediction.get("row_tokens"):
        yield f"tokens per row, images included: {_spread(lengths)}"
    if tokens := prediction.get("image_tokens"):
        yield f"tokens per image: {_spread(tokens)}"
    memory = prediction.get("memory")
    if not memory:
        return
    from realign.modeling.memory import size  # a check without a model needs no torch

    yield "memory before activations (weights + gradients + optimizer state of AdamW = all):"
    for entry in memory["training"]:
        parts = ("weights", "gradients", "optimizer_state")
        sizes = " + ".join(size(entry[f"{part}_bytes"]) for part in parts)
        yield f"  {entry['kind']:<5}{entry['dtype']:<9} {sizes} = {size(entry['total_bytes'])}"
    for entry in memory["estimates"]:
        line = f"  on top of it, estimated, {entry['dtype']}: "
        if (kept := entry["activations_bytes"]) is not None:
            again = entry["activations_with_checkpointing_bytes"]
            line += (
                f"activations of the longest pair {size(kept)}, with gradient checkpointing "
                f"{size(again)}; "
            )
        yield line + f"generation cache {size(entry['generation_cache_bytes_a_token'])} a token"


def _spread(spread: dict[str, Any]) -> str:
    return ", ".join(f"{name} {value:g}" for name, value in spread.items())
