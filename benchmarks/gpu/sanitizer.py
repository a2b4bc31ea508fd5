"""``compute-sanitizer`` over small checks: accesses out of bounds, and races in shared memory.

Each tool runs the checks of :mod:`benchmarks.gpu.checks` in a separate process, which ends itself
before the time is used up.  First, a tool has to find a planted access out of bounds, since a tool
that sees no kernel would find no error either.
"""

from __future__ import annotations

import re
import shutil
import sys
import tempfile
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from benchmarks.gpu.checks import kernel_checks
from benchmarks.gpu.processes import Ended, run_command
from benchmarks.gpu.session import Session
from benchmarks.result_files import load

TOOLS = ("memcheck", "racecheck")
_SUMMARY = re.compile(r"ERROR SUMMARY: (\d+) error|RACECHECK SUMMARY: (\d+) hazard")
# seconds of a child beside its checks: imports and the start of CUDA below the tool, the end of the
# check that runs when the time is used up, and the tool's summary
_BESIDE_CHECKS = 45.0
_PLANTED_SECONDS = 60.0


def sanitize(session: Session, backend: str, *, command: str = "compute-sanitizer") -> None:
    """Run every tool, and record a cell for each."""
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
    ended = _run([sanitizer, "--tool", "memcheck", *script], limit)
    found = summary_of(ended.output)
    if found:
        return {"status": "ok", "errors": found}
    if ended.code is None:
        return {"status": "not measured", "reason": "out of time"}
    reason = "the planted access was not found" if found == 0 else last_line(ended.output)
    return {"status": "failed", "reason": reason}


def _checked(
    sanitizer: str, tool: str, session: Session, backend: str, seconds: float
) -> dict[str, Any]:
    with tempfile.TemporaryDirectory() as folder:
        minutes = max(5.0, seconds - _BESIDE_CHECKS) / 60
        child = [
            sys.executable, "-m", "benchmarks.gpu", "--only", "checks", "--quick",
            "--device", session.device.type, "--backend", backend, "--minutes", f"{minutes:.3f}",
            "--out", folder, "--commit", session.run["commit"],
        ]  # fmt: skip
        ended = _run([sanitizer, "--tool", tool, *child], seconds)
        # a child that was ended may have left a part of a file as well
        files = sorted(Path(folder).glob("*.json"))
        statuses = [cell["status"] for file in files for cell in load(file)["cells"].values()]
    wanted = sum(1 for _ in kernel_checks(session.device, backend, tiny=True))
    return cell_of(ended, statuses, wanted)


def cell_of(ended: Ended, statuses: Sequence[str], wanted: int) -> dict[str, Any]:
    """Return the cell of a tool.

    Args:
        ended: The tool's output and exit code.
        statuses: Statuses of the checks that ran under the tool.
        wanted: Number of all checks.
    """
    text, is_whole = ended.output, ended.code is not None
    found = summary_of(text)
    passed, failed = statuses.count("ok"), statuses.count("failed")
    counts = {"checks": wanted, "passed": passed}
    if found:
        lines = [line.lstrip("= ") for line in text.splitlines() if line.startswith("=========")]
        first = [line for line in lines if line.strip()][1:9]
        reason = f"{found} found: {' '.join(first)}"[:300]
        return {"status": "failed", "reason": reason, "errors": found, "first": first, **counts}
    if failed:
        reason = f"{failed} of {wanted} checks failed below the tool"
        return {"status": "failed", "reason": reason, **counts}
    if is_whole and (found is None or not statuses):
        reason = last_line(text) if found is None else f"no check ran: {last_line(text)}"
        return {"status": "failed", "reason": reason, **counts}
    if not is_whole or passed < wanted:
        reason = f"out of time after {passed} of {wanted} checks"
        return {"status": "not measured", "reason": reason, **counts}
    return {"status": "ok", "errors": 0, **counts}


def summary_of(text: str) -> int | None:
    """Return the number of errors or hazards in the tool's summary, or None without a summary."""
    numbers = [int(one or other) for one, other in _SUMMARY.findall(text)]
    return max(numbers) if numbers else None


def last_line(text: str) -> str:
    """Return the last line that is not empty."""
    lines = [line.strip() for line in text.splitlines() if line.strip("= \t")]
    return lines[-1][:300] if lines else "it said nothing"


def _run(command: list[str], seconds: float) -> Ended:
    # every tensor is an allocation of its own, whose end is the end of what may be touched
    return run_command(command, seconds, {"PYTORCH_NO_CUDA_MEMORY_CACHING": "1"})
