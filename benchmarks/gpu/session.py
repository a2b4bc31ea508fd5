"""One call of the script: its deadline, its cells as they are measured, and a table at the end."""

from __future__ import annotations

import math
import time
import traceback
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any, NamedTuple

import torch

from benchmarks.promises import Outcome
from benchmarks.result_files import is_current, load, merge

Cell = dict[str, Any]
Measure = Callable[[], Cell]

LONGEST_REASON = 300
_MOST_ROWS = 40  # of the table at the end, which is all that some terminals keep


class Check(NamedTuple):
    """A check that has not run yet."""

    name: str
    run: Callable[[], Outcome]


class Session:
    """Measurements of one call of this script, and the time that it may take.

    Args:
        device: The device of the tensors.
        path: The result file.
        run: Environment of the call, from :func:`benchmarks.result_files.environment`.
        minutes: Time after which no measurement is started.
    """

    def __init__(self, device: torch.device, path: Path, run: dict[str, Any], minutes: float):
        self.device, self.path, self.run = device, path, run
        self.deadline = time.monotonic() + 60 * minutes
        self.cells: dict[str, Cell] = {}
        self._broken_by: str | None = None  # the cell that ended this process's use of its GPU

    @property
    def seconds_left(self) -> float:
        """Seconds until the time is used up, 0 from then on."""
        return max(0.0, self.deadline - time.monotonic())

    @property
    def is_over(self) -> bool:
        """Return whether the time is used up."""
        return time.monotonic() > self.deadline

    def is_done(self, key: str) -> bool:
        """Return whether an earlier call has finished a cell."""
        return is_current(load(self.path), key, self.run)

    def add(self, key: str, measure: Measure) -> None:
        """Measure a cell, if there is time, and record it at once."""
        if self.is_done(key):
            return
        if self._broken_by is not None:
            reason = f"{self._broken_by} has ended this process's use of its GPU"
            self.record(key, {"status": "not measured", "reason": reason})
            return
        if self.is_over:
            self.record(key, {"status": "not measured", "reason": "out of time"})
            return
        try:
            cell = measure()
        except Exception as error:  # one provider's failure at one shape is a cell's content
            cell = {"status": "failed", "reason": first_line(error)}
            traceback.print_exc(limit=-3)
        self.record(key, self._released(key, cell))

    def _released(self, key: str, cell: Cell) -> Cell:
        """Free the GPU's memory; if that fails, so have this cell and all later ones."""
        if self.device.type != "cuda":
            return cell
        try:
            torch.cuda.synchronize(self.device)
            torch.cuda.empty_cache()
        except RuntimeError as error:
            # an access out of bounds stays an error of every later call
            self._broken_by = key
            traceback.print_exc(limit=-1)
            if cell["status"] != "failed":
                return cell | {"status": "failed", "reason": first_line(error)}
        return cell

    def record(self, key: str, cell: Cell) -> None:
        """Write a cell to the result file, and print it."""
        self.cells[key] = cell
        merge(self.path, self.run, {key: cell})
        if cell.get("kind") != "check" or cell["status"] == "failed":
            print(f"{key:60} {describe(cell)}", flush=True)

    def check(self, prefix: str, checks: Iterable[Check]) -> None:
        """Run checks, each as a cell of its own."""
        for check in checks:
            self.add(f"{prefix}/{check.name}", lambda check=check: _outcome(check))

    @property
    def failed(self) -> list[str]:
        """Keys of cells that failed."""
        return [key for key, cell in self.cells.items() if cell["status"] == "failed"]

    def table(self) -> str:
        """Return the number of cells by part and status, then the failed and unavailable cells."""
        parts: dict[str, list[str]] = {}
        for key, cell in self.cells.items():
            parts.setdefault(_part_of(key), []).append(cell["status"])
        statuses = ("ok", "failed", "unavailable", "not measured")
        lines = [f"{'part':40}" + "".join(f"{status:>14}" for status in statuses)]
        for part, found in sorted(parts.items()):
            counts = "".join(f"{found.count(status):14}" for status in statuses)
            lines.append(f"{part:40}{counts}")
        bad = [(key, cell) for key, cell in self.cells.items() if cell["status"] == "failed"]
        bad += [(key, cell) for key, cell in self.cells.items() if cell["status"] == "unavailable"]
        lines += [f"{key}: {describe(cell)[:160]}" for key, cell in bad[:_MOST_ROWS]]
        if len(bad) > _MOST_ROWS:
            lines.append(f"and {len(bad) - _MOST_ROWS} more")
        return "\n".join(lines)


def _part_of(key: str) -> str:
    first, *rest = key.split("/")
    grouped = first in ("checks", "hardware", "question", "head") and len(rest) > 1
    return f"{first}/{rest[0]}" if grouped else first


def _outcome(check: Check) -> Cell:
    outcome = check.run()
    if not outcome.problem:
        return {"status": "ok", "kind": "check"}
    print(f"FAILED {outcome.name}\n  {outcome.problem}", flush=True)
    return {"status": "failed", "kind": "check", "reason": _shortened(outcome.problem)}


def first_line(error: BaseException) -> str:
    """Return an error's type and the first line of its message."""
    return _shortened(f"{type(error).__name__}: {str(error).strip().partition(chr(10))[0]}")


def _shortened(text: str) -> str:
    lines = [line.strip() for line in text.strip().splitlines() if line.strip()]
    # the last line of a traceback says what happened, the first line of a message does
    line = lines[-1] if lines and lines[0].startswith("Traceback") else (lines or [""])[0]
    return line[:LONGEST_REASON]


def describe(cell: Cell) -> str:
    """Describe a cell in one line."""
    if cell["status"] != "ok":
        return f"{cell['status']}: {cell.get('reason', '')}"
    if "ratio_to_gemm" in cell:
        worst = " ".join(f"{name} {value:.1e}" for name, value in cell["errors"].items())
        return (
            f"{cell['ms']:9.3f} ms  {cell['ratio_to_gemm']:6.2f} x GEMM  "
            f"{cell['peak_bytes'] / 2**20:9.1f} MiB  {worst}"
        )
    parts = [f"{cell['ms']:.3f} ms"] if "ms" in cell else []
    parts += [f"{name} {cell[name]['ms']:.3f} ms" for name in cell if _has_ms(cell[name])]
    names = ("status", "ms", "ms_p10", "ms_p90", "repeats", "run", "bytes")
    for name, value in cell.items():
        if isinstance(value, float) and name not in names:
            parts.append(f"{name} {value:.3g}" if math.isfinite(value) else f"{name} {value}")
        elif isinstance(value, int) and name not in names:
            parts.append(f"{name} {value}")
    return ", ".join(parts)


def _has_ms(value: Any) -> bool:
    return isinstance(value, dict) and "ms" in value
