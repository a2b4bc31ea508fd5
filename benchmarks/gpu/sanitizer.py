"""``compute-sanitizer`` over small checks: accesses out of bounds, and races in shared memory.

Each tool runs the checks of :mod:`benchmarks.gpu.checks` in a process of its own, which ends itself
before the time is used up.  First a kernel with a planted access out of bounds has to be found: a
tool that sees no kernel finds no error either.
"""

from __future__ import annotations

import os
import re
import shutil
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

from benchmarks.gpu.session import Session
from benchmarks.result_files import load

ROOT = Path(__file__).parents[2]
TOOLS = ("memcheck", "racecheck")
_SUMMARY = re.compile(r"ERROR SUMMARY: (\d+) error|RACECHECK SUMMARY: (\d+) hazard")
_TO_END = 30.0  # seconds that a child has to write down what it found, and the tool its summary
_PLANTED_SECONDS = 60.0


def sanitize(session: Session, backend: str, *, command: str = "compute-sanitizer") -> None:
    """Run every tool, and write down a cell for each."""
    path = shutil.which(command)
    if path is None:
        reason = f"{command} is not on the PATH; it comes with the CUDA toolkit"
        for name in ("planted", *TOOLS):
            session.record(f"sanitizer/{name}", {"status": "unavailable", "reason": reason})
        return
    session.add("sanitizer/planted", lambda: _planted(path, session))
    for number, tool in enumerate(TOOLS):
        share = session.seconds_left / (len(TOOLS) - number)
        session.add(
            f"sanitizer/{tool}",
            lambda tool=tool, share=share: _checked(path, tool, session, backend, share),
        )


def _planted(sanitizer: str, session: Session) -> dict[str, Any]:
    script = [sys.executable, "-m", "benchmarks.gpu.planted"]
    limit = min(_PLANTED_SECONDS, session.seconds_left)
    text, _ = _run([sanitizer, "--tool", "memcheck", *script], limit)
    found = summary_of(text)
    if not found:
        reason = "the planted access was not found" if found == 0 else last_line(text)
        return {"status": "failed", "reason": reason}
    return {"status": "ok", "errors": found}


def _checked(
    sanitizer: str, tool: str, session: Session, backend: str, seconds: float
) -> dict[str, Any]:
    with tempfile.TemporaryDirectory() as folder:
        minutes = max(5.0, seconds - _TO_END) / 60
        child = [
            sys.executable, "-m", "benchmarks.gpu", "--only", "checks", "--quick",
            "--device", session.device.type, "--backend", backend, "--minutes", f"{minutes:.3f}",
            "--out", folder, "--commit", session.run["commit"],
        ]  # fmt: skip
        text, is_whole = _run([sanitizer, "--tool", tool, *child], seconds)
        cells = [cell for path in Path(folder).iterdir() for cell in load(path)["cells"].values()]
    passed = sum(cell["status"] == "ok" for cell in cells)
    return cell_of(text, len(cells), passed, is_whole=is_whole)


def cell_of(text: str, checks: int, passed: int, *, is_whole: bool) -> dict[str, Any]:
    """Return what a tool's output and the checks that ran below it say."""
    found = summary_of(text)
    counts = {"checks": checks, "passed": passed}
    if found is None:
        status = "failed" if is_whole else "not measured"
        reason = last_line(text) if is_whole else f"out of time after {passed} checks"
        return {"status": status, "reason": reason, **counts}
    if found:
        lines = [line.lstrip("= ") for line in text.splitlines() if line.startswith("=========")]
        first = [line for line in lines if line.strip()][1:9]
        reason = f"{found} found: {' '.join(first)}"[:300]
        return {"status": "failed", "reason": reason, "errors": found, "first": first, **counts}
    if not passed:
        return {"status": "failed", "reason": f"no check ran: {last_line(text)}", **counts}
    return {"status": "ok", "errors": 0, **counts}


def summary_of(text: str) -> int | None:
    """Return the number of errors or hazards by the tool's own summary, or None without one."""
    numbers = [int(one or other) for one, other in _SUMMARY.findall(text)]
    return max(numbers) if numbers else None


def last_line(text: str) -> str:
    """Return the last line that says something."""
    lines = [line.strip() for line in text.splitlines() if line.strip("= \t")]
    return lines[-1][:300] if lines else "it said nothing"


def _run(command: list[str], seconds: float) -> tuple[str, bool]:
    """Return the output of a command, and whether it ended in time."""
    # every tensor is an allocation of its own, whose end is the end of what may be touched
    environment = {**os.environ, "PYTORCH_NO_CUDA_MEMORY_CACHING": "1"}
    with tempfile.TemporaryFile(mode="w+", encoding="utf-8") as output:
        with subprocess.Popen(
            command, cwd=ROOT, stdout=output, stderr=subprocess.STDOUT, env=environment
        ) as process:
            try:
                process.wait(timeout=max(1.0, seconds))
                is_whole = True
            except subprocess.TimeoutExpired:
                is_whole = False
                process.kill()
        output.seek(0)
        return output.read(), is_whole
