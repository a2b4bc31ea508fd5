"""The tests of the Triton kernels on the GPU itself, run by pytest in a separate process.

They run at the same time as other checks, since most of their time is compilation on the CPU.
There is one cell per file, with the tests that passed and failed, and one for the whole run.
"""

from __future__ import annotations

import importlib.util
import os
import re
import subprocess
import sys
import tempfile
from collections import defaultdict
from typing import Any

from benchmarks.gpu.processes import ROOT, has_ended
from benchmarks.gpu.session import Session

# a refused value ends a process's use of its GPU
LEFT_OUT = ("test_validation.py", "backends/triton/test_refused_values.py")
_RESULT = re.compile(r"(PASSED|FAILED|ERROR|SKIPPED|XFAIL)\s+(tests/\S+\.py)::(.+?)\s*$")
_RESULT_ALONE = re.compile(r"^(tests/\S+\.py)::(.+?) (PASSED|FAILED|ERROR|SKIPPED|XFAIL)\b")
_NOT_COLLECTED = re.compile(r"^ERROR (tests/\S+\.py)(?: - (.*))?$")
_SUMMARY = "short test summary info"  # names failures again, and collection errors only here
_PROCESSES = 8


def command(selected: str = "triton") -> list[str]:
    """Return the command of the tests, in several processes if pytest-xdist is installed."""
    folder = "tests/realign_kernels"
    shared = importlib.util.find_spec("xdist") is not None
    return [
        # those of the kernels first, then those of every backend with this one
        sys.executable, "-m", "pytest", f"{folder}/backends/triton", folder,
        "-k", selected, "-v", "--tb=line", "--continue-on-collection-errors",
        # a warning of another version of a library is no failure of a kernel
        "-W", "default", "-p", "no:cacheprovider", "-m", "not full and not slow and not browser",
        *(f"--ignore={folder}/{name}" for name in LEFT_OUT),
        *(["-n", str(min(_PROCESSES, os.cpu_count() or 1))] if shared else []),
    ]  # fmt: skip


class NativeTests:
    """The tests, as a context in which other checks run at the same time.

    Args:
        session: The call that records the cells.
        selected: Expression of pytest's ``-k``.
    """

    def __init__(self, session: Session, selected: str = "triton") -> None:
        self._session = session
        self._process: subprocess.Popen[str] | None = None
        # a file, since nobody reads a pipe meanwhile
        self._output = tempfile.TemporaryFile(  # noqa: SIM115
            mode="w+", encoding="utf-8", errors="replace"
        )
        if importlib.util.find_spec("pytest") is None:
            return
        # without it they run in Triton's interpreter, as on any machine
        settings = {"REALIGN_EXAMPLES": "50"}  # as `make test` has it
        if session.device.type == "cuda":
            settings["REALIGN_TEST_DEVICE"] = "cuda"
        self._process = subprocess.Popen(
            command(selected),
            cwd=ROOT,
            stdout=self._output,
            stderr=subprocess.STDOUT,
            text=True,
            env={**os.environ, **settings},
            start_new_session=True,  # so that pytest's own processes end with it
        )

    def __enter__(self) -> NativeTests:
        return self

    def __exit__(self, kind: type[BaseException] | None, *_: object) -> None:
        # an interrupted call waits for nothing
        self.finish(self._session.seconds_left if kind is None else 0.0)

    def finish(self, seconds: float) -> None:
        """Wait for the tests as long as there is time, end them, and record their cells."""
        if self._process is None:
            reason = "pytest is not installed"
            self._session.record("tests", {"status": "unavailable", "reason": reason})
            return
        is_whole = has_ended(self._process, seconds)
        self._output.seek(0)
        text = self._output.read()
        self._output.close()
        for key, cell in cells_of(text, self._process.returncode, is_whole=is_whole).items():
            self._session.record(key, cell)


def cells_of(text: str, exit_code: int | None, *, is_whole: bool) -> dict[str, dict[str, Any]]:
    """Return a cell for every file that pytest has named, and one for the run."""
    found: dict[str, dict[str, list[str]]] = defaultdict(lambda: defaultdict(list))
    in_summary = False
    for line in text.splitlines():
        in_summary = in_summary or (line.startswith("=") and _SUMMARY in line)
        if in_summary:
            match = _NOT_COLLECTED.match(line)
            if match is None:
                continue
            path, status, name = match[1], "ERROR", f"not collected: {match[2] or ''}"
        elif match := _RESULT.search(line):
            status, path, name = match.groups()
        elif match := _RESULT_ALONE.match(line):
            path, name, status = match.groups()
        else:
            continue
        found[path.removeprefix("tests/realign_kernels/")][status].append(name)
    cells: dict[str, dict[str, Any]] = {}
    for path, by_status in sorted(found.items()):
        bad = sorted({*by_status["FAILED"], *by_status["ERROR"]})
        cell: dict[str, Any] = {
            "status": "failed" if bad else "ok",
            "passed": len(by_status["PASSED"]),
            "skipped": len(by_status["SKIPPED"]),
        }
        if bad:
            cell |= {"reason": f"{len(bad)} failed, the first {bad[0]}"[:300], "failures": bad[:50]}
        cells[f"tests/{path}"] = cell
    passed = sum(cell["passed"] for cell in cells.values())
    if not is_whole:
        reason = f"out of time after {passed} tests had passed"
        for cell in cells.values():
            if cell["status"] == "ok":  # other tests of the file may be missing
                cell |= {"status": "not measured", "reason": "out of time within the run"}
        cells["tests"] = {"status": "not measured", "reason": reason}
    elif exit_code in (0, 1) and cells:
        failed = [key for key, cell in cells.items() if cell["status"] == "failed"]
        cells["tests"] = {"status": "failed" if failed or exit_code else "ok", "passed": passed}
        if cells["tests"]["status"] == "failed":
            cells["tests"]["reason"] = ", ".join(failed)[:300] or "pytest exited with 1"
    else:
        lines = [line.strip() for line in text.splitlines() if line.strip()] or ["it said nothing"]
        reason = f"pytest exited with {exit_code}: {lines[-1]}"
        cells["tests"] = {"status": "failed", "reason": reason[:300]}
    return cells
